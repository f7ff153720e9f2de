"""Lines typed by a user -> a chat's answers, streamed; a line that begins with / is a command.

/image cat.png     show an image with the next message; a name may be in quotes, or escaped as in a shell
/video clip.mp4    show a video with the next message
/undo   /reset     take back the last turn, or all turns
/quit              quit, like the end of the input
"""

from __future__ import annotations

import contextlib
import itertools
import signal
import sys
from collections.abc import Iterator, Sequence
from typing import Any, TextIO

from emu_jax.data.images import load_image
from emu_jax.errors import UserError, nearest
from emu_jax.generate.chat import UNDRAWN, Chat
from emu_jax.generate.files import DrawingRequest, save
from emu_jax.generate.messages import VIDEO_SUFFIXES, Video, read_video
from emu_jax.generate.prompt import ImageLike
from emu_jax.storage import Path, is_bucket, typed_path

COMMANDS = {"/image": "PATH", "/video": "PATH", "/undo": "", "/reset": "", "/quit": ""}
HELP = " ".join(f"{name} {argument}".strip() + "," for name, argument in COMMANDS.items()).rstrip(",")


class Console:
    """A chat driven by lines; shown images and videos go with the next message.

    Args:
      settings: as in `Chat.say`. Beam search does not stream: the answer is written once it is complete.
      drawings: folder of the images that answers begin, drawing-1.png and so on; None: the model has no visual decoder.
    """

    def __init__(self, chat: Chat, out: TextIO, settings: dict[str, Any], drawings: Path | None = None):
        self.chat, self.out, self.settings, self.drawings = chat, out, settings, drawings
        self._shown: list[ImageLike | Video] = []

    def show(self, path: Path, *, video: bool) -> None:
        """Reads an image or a video for the next message.

        Raises:
          UserError: the file cannot be read.
        """
        self._shown.append(Video(read_video(Video(path))) if video else load_image(path))

    def take(self, line: str) -> bool:
        """Executes one line; returns whether the conversation continues.

        Raises:
          UserError: the line cannot be executed; nothing has changed.
        """
        line = line.strip()
        if not line:
            return True
        name, _, argument = line.partition(" ")
        if name not in COMMANDS and (command := _shows(line)):
            raise UserError(f"{line}: the name of a file; to show it, write {command} {line}")
        if not line.startswith("/"):
            self._say(line)
            return True
        if name not in COMMANDS:
            raise UserError(f"{name} is no command; did you mean {nearest(name, COMMANDS)}? The commands are {HELP}")
        if bool(argument.strip()) != bool(COMMANDS[name]):
            raise UserError(f"{line}: expected {name} {COMMANDS[name]}".rstrip())
        if name in ("/image", "/video"):
            self.show(typed_path(argument.strip()), video=name == "/video")
        elif name == "/undo":
            self.chat.undo()
        elif name == "/reset":
            self.chat.reset()
            self._shown = []
        return name != "/quit"

    def _say(self, message: str) -> None:
        parts, settings = [*self._shown, message], self.settings
        if settings.get("num_beams", 1) > 1:
            with _interruption() as interrupts:
                self._write(self.chat.say(parts, **settings).text)
        else:
            settings = {name: settings[name] for name in settings.keys() - {"num_beams", "length_penalty"}}
            with _interruption() as interrupts, contextlib.closing(self.chat.stream(parts, **settings)) as pieces:
                for piece in pieces:
                    self._write(piece)
                    if interrupts:
                        break
        self._shown = []
        self._write("\n")
        if not interrupts and self.chat.history[-1].answer.ended_by == "image":
            if self.drawings is None:
                self._write(f"({UNDRAWN})\n")
            else:
                self._draw(message, self.drawings)
        if interrupts:
            raise KeyboardInterrupt

    def _draw(self, message: str, folder: Path) -> None:
        """Draws the image that the answer to a message began, and writes the path of its file."""
        drawn = self.chat.draw(seed=self.settings.get("seed", 0))
        folder.mkdir(parents=True, exist_ok=True)
        files = (folder / f"drawing-{number}.png" for number in itertools.count(1))
        file = next(file for file in files if not file.exists())
        save(drawn, DrawingRequest((message,), drawn.seed, file), {})
        self._write(f"{file}\n")

    def _write(self, text: str) -> None:
        self.out.write(text)
        self.out.flush()


def _shows(line: str) -> str:
    """The command that shows the file that a line names, as when it is dropped into a terminal; "" for other lines."""
    with contextlib.suppress(UserError, OSError, ValueError, RuntimeError):  # RuntimeError: ~ of an unknown user
        path = typed_path(line)
        if path.suffix and not is_bucket(path) and path.is_file():
            return "/video" if path.suffix.lower() in VIDEO_SUFFIXES else "/image"
    return ""


@contextlib.contextmanager
def _interruption() -> Iterator[list[int]]:
    """Ctrl-C fills the list, which is checked between pieces, because JAX should not be interrupted inside a call.

    A second Ctrl-C interrupts at once.
    """
    interrupts: list[int] = []

    def handler(number: int, frame: Any) -> None:
        interrupts.append(number)
        if len(interrupts) > 1:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, handler)
    try:
        yield interrupts
    finally:
        signal.signal(signal.SIGINT, before)


def converse(console: Console, lines: Iterator[str] | Sequence[str]) -> None:
    """Executes lines up to /quit or the end. A line that cannot be executed raises UserError."""
    for line in lines:
        if not console.take(line):
            return


def converse_at_terminal(console: Console) -> None:
    """Prompts for lines. Errors are printed, and the chat continues; Ctrl-C stops an answer or discards a line, and
    Ctrl-D quits."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (adds line editing and a history to `input`)
    print(f"{HELP}; Ctrl-C stops an answer, Ctrl-D quits", file=console.out)
    while True:
        try:
            if not console.take(input("> ")):
                return
        except EOFError:
            print(file=console.out)
            return
        except KeyboardInterrupt:
            print("(stopped)", file=console.out)
        except UnicodeDecodeError as error:
            print(f"the line is not UTF-8 ({error.reason})", file=sys.stderr)
        except UserError as error:
            print(error, file=sys.stderr)
