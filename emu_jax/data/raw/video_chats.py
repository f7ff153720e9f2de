"""Chats about videos: VideoChat's and Video-ChatGPT's questions and answers.

[{"video": "050951_051000/1022713978.mp4", "QA": [{"i": "", "q": "What happens?", "a": "…"}, …]}, …]   VideoChat
[{"video_id": "v_k_ZXmr8pmrs", "q": "What happens?", "a": "…"}, …]                                    Video-ChatGPT

*.json ─ VideoChat | VideoChatGPT
       ─ RawDocument(key, "video_chat", (Text(…, "system"), up to 24 x RawImage, Text(…, "user"), …))
"""

from __future__ import annotations

import abc
import dataclasses
import re
import zlib
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from emu_jax.data.document import Text
from emu_jax.data.frames import STORED, spread_indices
from emu_jax.data.raw.files import Skip, check_folder, clean_text, find_shards, json_array, shard_name
from emu_jax.data.raw.reader import RawDocument, RawImage, Reject
from emu_jax.data.system_messages import VIDEO_SYSTEM
from emu_jax.data.video import VideoError, read_frames
from emu_jax.errors import UserError

# Names of videos are tried as they are, then with these: Video-ChatGPT's have no suffix.
SUFFIXES = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".gif", ".webp")
SHARD = re.compile(r"(.+)@(\d+)/(\d+)", re.DOTALL)

Turn = tuple[str, str]  # question, answer


def find_video(folder: Path, name: object) -> Path:
    """The video of that name under `folder`, with or without its suffix, or right in it; `name` is not trusted.

    Raises:
      Skip: there is none, or the name leads out of the folder.
    """
    if not isinstance(name, str) or not name.strip():
        raise Skip("missing_video", f"no video's name: {ascii(name)[:80]}")
    inside = PurePosixPath(name)
    if inside.is_absolute() or ".." in inside.parts or "\0" in name:
        raise Skip("unsafe_path", f"{ascii(name)[:200]} leads out of the videos' folder")
    for place in dict.fromkeys((str(inside), inside.name)):
        for suffix in ("", *SUFFIXES):
            try:
                if (path := folder / (place + suffix)).is_file():
                    return path
            except (OSError, ValueError) as error:
                raise Skip(
                    "missing_video", f"{ascii(name)[:200]} is no file's name ({type(error).__name__})"
                ) from error
    raise Skip("missing_video", f"no video {ascii(name)[:200]}, also not with one of {', '.join(SUFFIXES)}")


@dataclasses.dataclass(frozen=True)
class VideoChats(abc.ABC):
    """A document a chat about one video: its frames, which are the first question's, then questions and answers.

    A file is read in parts, by videos: each part parses all of it, and decodes its own videos alone.

    Attributes:
      videos: the videos' folder, relative to the JSON's.
      frames: stored of a video, spread over it; all of a shorter one. Training shows some of them.
      turns: questions in a chat, at most; further ones make another chat about the video, lest a row cut it.
      system: begin with the paper's system message for videos (`system_messages.py`).
      max_characters: of a question or an answer.
      shard_bytes: of a file that a part is about.
    """

    videos: str = "."
    frames: int = STORED
    turns: int = 8
    system: bool = True
    max_characters: int = 100_000
    shard_bytes: int = 1 << 20

    def __post_init__(self):
        for name in ("frames", "turns", "shard_bytes"):
            if getattr(self, name) < 1:
                raise UserError(f"{type(self).__name__}.{name}={getattr(self, name)}; expected at least 1")

    @abc.abstractmethod
    def chat_of(self, number: int, record: dict[str, Any]) -> tuple[Hashable, object]:
        """Which chat a record belongs to, and the name of its video."""

    @abc.abstractmethod
    def turns_of(self, record: dict[str, Any]) -> list[Turn]:
        """A record's questions and answers.

        Raises:
          Skip: it has none, or one is empty.
        """

    def shards(self, path: str) -> list[str]:
        """`<file>@<part>/<parts>`."""
        found = find_shards(path, ("*.json",), f"a JSON array of questions and answers, as {type(self).__name__}'s")
        check_folder(f"{type(self).__name__}.videos", found, self.videos)
        shards = []
        for file in found:
            parts = -(-Path(file).stat().st_size // self.shard_bytes) or 1
            shards += [f"{file}@{part}/{parts}" for part in range(parts)]
        return shards

    def read(self, shard: str) -> Iterator[RawDocument | Reject]:
        if (named := SHARD.fullmatch(shard)) is None:
            raise UserError(f"{shard}: not one of this reader's shards; expected PATH#PART/PARTS")
        path, part, parts = named.groups()
        name, folder = shard_name(path), Path(path).parent / self.videos
        chats: dict[Hashable, tuple[object, list[tuple[str, dict[str, Any]]]]] = {}
        faults = []
        try:
            with open(path, encoding="utf-8", errors="surrogateescape") as file:
                for number, record in enumerate(json_array(file)):
                    chat, video = self.chat_of(number, record) if isinstance(record, dict) else (number, None)
                    if zlib.crc32(ascii(chat).encode()) % int(parts) == int(part):
                        chats.setdefault(chat, (video, []))[1].append((f"{name}/{number:09d}", record))
        except Skip as skip:  # every part sees it, one tells it
            faults = [skip.reject(name)] if part == "0" else []
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); expected a JSON array") from error
        for video, records in chats.values():
            yield from self._chats(folder, video, records)
        yield from faults

    def _chats(
        self, folder: Path, video: object, records: Sequence[tuple[str, dict[str, Any]]]
    ) -> Iterator[RawDocument | Reject]:
        turns: list[tuple[str, Turn]] = []
        for key, record in records:
            try:
                if not isinstance(record, dict):
                    raise Skip("not_a_chat", f"expected an object, found {ascii(record)[:40]}")
                turns += [(key, self._clean(turn, n)) for n, turn in enumerate(self.turns_of(record), 1)]
            except Skip as skip:
                yield skip.reject(key, whole=len(records) == 1)
        if not turns:
            return
        try:
            images = self._frames(find_video(folder, video))
        except Skip as skip:
            yield skip.reject(turns[0][0])
            return
        for start in range(0, len(turns), self.turns):
            key = f"{turns[0][0]}+{start}" if start else turns[0][0]
            system = [Text(VIDEO_SYSTEM, "system")] if self.system else []
            texts = [
                text
                for _, (q, a) in turns[start : start + self.turns]
                for text in (Text(q, "user"), Text(a, "assistant"))
            ]
            yield RawDocument(key, "video_chat", (*system, *images, *texts))

    def _clean(self, turn: Turn, number: int) -> Turn:
        question, answer = (clean_text(text, self.max_characters) for text in turn)
        if not question or not answer:
            raise Skip("empty_turn", f"the {'answer' if question else 'question'} {number} is empty")
        return question, answer

    def _frames(self, path: Path) -> list[RawImage]:
        try:
            return [RawImage(frame) for frame in read_frames(path, self.frames, spread_indices)]
        except VideoError as error:
            raise Skip(error.reason, f"{path.name}: {error.detail}") from error
        except OSError as error:
            raise Skip("unreadable_video", f"{path.name}: {error.strerror}") from error


@dataclasses.dataclass(frozen=True)
class VideoChat(VideoChats):
    """VideoChat's: a record a chat. The instruction `i` of the first question stands before it, or is all of it."""

    def chat_of(self, number: int, record: dict[str, Any]) -> tuple[Hashable, object]:
        return number, record.get("video")

    def turns_of(self, record: dict[str, Any]) -> list[Turn]:
        found = record.get("QA")
        if not isinstance(found, list) or not found:
            raise Skip("no_turns", "QA is no list of questions and answers, or an empty one")
        turns = []
        for number, turn in enumerate(found, 1):
            if not isinstance(turn, dict):
                raise Skip("empty_turn", f"question {number} is no object")
            asked = [turn.get("q", "")]
            if number == 1:
                asked.insert(0, turn.get("i") or record.get("i") or "")
            turns.append(_turn(asked, turn.get("a"), number))
        return turns


@dataclasses.dataclass(frozen=True)
class VideoChatGPT(VideoChats):
    """Video-ChatGPT's: a record a question; those about one video, wherever they stand, are one chat's."""

    def chat_of(self, number: int, record: dict[str, Any]) -> tuple[Hashable, object]:
        video = record.get("video_id")
        return (video, video) if isinstance(video, str) and video.strip() else (number, video)

    def turns_of(self, record: dict[str, Any]) -> list[Turn]:
        return [_turn([record.get("q")], record.get("a"), 1)]


def _turn(asked: list[object], answer: object, number: int) -> Turn:
    texts = [text for text in asked if isinstance(text, str)]
    if len(texts) < len(asked) or not isinstance(answer, str):
        raise Skip("empty_turn", f"question {number}: expected texts as q and a")
    return "\n".join(text.strip() for text in texts if text.strip()), answer
