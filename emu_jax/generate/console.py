"""Lines that a person types -> a chat's answers, streamed; a line that begins with / is a command.

/image cat.png     shows an image with the next message
/video clip.mp4    shows a video with it
/undo   /reset     take back the last turn, or all
/quit              ends, as the end of the input does
"""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from emu_jax.data.images import load_image
from emu_jax.errors import UserError, nearest
from emu_jax.generate.chat import Chat, Video, read_video
from emu_jax.generate.prompt import ImageLike

COMMANDS = {"/image": "PATH", "/video": "PATH", "/undo": "", "/reset": "", "/quit": ""}
HELP = " ".join(f"{name} {argument}".strip() + "," for name, argument in COMMANDS.items()).rstrip(",")


class Console:
    """A chat that is led by lines; images that were shown go with the next message.

    `settings` are `Chat.say`'s. Beams do not stream: with them an answer is written once it is whole.
    """

    def __init__(self, chat: Chat, out: TextIO, settings: dict[str, Any]):
        self.chat, self.out, self.settings = chat, out, settings
        self._shown: list[ImageLike | Video] = []

    def show(self, path: Path, *, video: bool) -> None:
        """Reads an image or a video, for the next message.

        Raises:
          UserError: it cannot be read.
        """
        self._shown.append(Video(read_video(Video(path))) if video else load_image(path))

    def take(self, line: str) -> bool:
        """Does what a line says; whether the conversation goes on.

        Raises:
          UserError: the line cannot be done, and changed nothing.
        """
        line = line.strip()
        if not line:
            return True
        if not line.startswith("/"):
            self._say(line)
            return True
        name, _, argument = line.partition(" ")
        if name not in COMMANDS:
            raise UserError(f"{name} is no command; did you mean {nearest(name, COMMANDS)}? There are {HELP}")
        if bool(argument.strip()) != bool(COMMANDS[name]):
            raise UserError(f"{line}: expected {name} {COMMANDS[name]}".rstrip())
        if name in ("/image", "/video"):
            self.show(Path(argument.strip()).expanduser(), video=name == "/video")
        elif name == "/undo":
            self.chat.undo()
        elif name == "/reset":
            self.chat.reset()
            self._shown = []
        return name != "/quit"

    def _say(self, message: str) -> None:
        parts, settings = [*self._shown, message], self.settings
        if settings.get("num_beams", 1) > 1:
            with _interruption() as asked:
                self._write(self.chat.say(parts, **settings).text)
        else:
            settings = {name: settings[name] for name in settings.keys() - {"num_beams", "length_penalty"}}
            with _interruption() as asked, contextlib.closing(self.chat.stream(parts, **settings)) as pieces:
                for piece in pieces:
                    self._write(piece)
                    if asked:
                        break
        self._shown = []
        self._write("\n")
        if asked:
            raise KeyboardInterrupt

    def _write(self, text: str) -> None:
        self.out.write(text)
        self.out.flush()


@contextlib.contextmanager
def _interruption() -> Iterator[list[int]]:
    """Ctrl-C fills the list, to be looked at between pieces: JAX is best not interrupted at any place. Twice, it is."""
    asked: list[int] = []

    def ask(number: int, frame: Any) -> None:
        asked.append(number)
        if len(asked) > 1:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


def converse(console: Console, lines: Iterator[str] | Sequence[str]) -> None:
    """All lines, or those up to /quit. What cannot be done ends it, with UserError."""
    for line in lines:
        if not console.take(line):
            return


def converse_at_terminal(console: Console) -> None:
    """Asks for lines. What cannot be done is told, and it goes on; Ctrl-C stops an answer or drops a line, Ctrl-D
    ends it all."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives `input` editing and a history)
    print(f"{HELP}; Ctrl-C stops an answer, Ctrl-D ends", file=console.out)
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
