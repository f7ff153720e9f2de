"""What the readers of chats about videos share: a JSON array of questions and answers, and a folder of videos.

*.json ─ VideoChats ─ RawDocument(key, "video_chat", (Text(…, "system"), up to 24 x RawImage, Text(…, "user"), …))
"""

from __future__ import annotations

import abc
import dataclasses
import re
import zlib
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

from emu_jax.data.document import Text
from emu_jax.data.frames import STORED
from emu_jax.data.raw.files import Skip, check_folder, clean_text, find_shards, json_array, shard_name
from emu_jax.data.raw.reader import RawDocument, Reject
from emu_jax.data.raw.video_files import find_video, stored_frames
from emu_jax.data.system_messages import VIDEO_SYSTEM
from emu_jax.errors import UserError

SHARD = re.compile(r"(.+)@(\d+)/(\d+)", re.DOTALL)

Turn = tuple[str, str]  # question, answer


@dataclasses.dataclass(frozen=True)
class VideoChats(abc.ABC):
    """One document per chat about one video: its frames, which belong to the first question, then the turns.

    A file is divided into parts by videos. Each part parses the whole file but decodes only its own videos.

    Attributes:
      videos: folder of the videos, relative to the JSON's.
      frames: number of frames stored per video, spread over it; all of a shorter one. Training shows some of them.
      turns: maximum number of questions per chat; further ones form another chat about the video, so that no row cuts
        it.
      system: whether to begin with the paper's system message for videos (`system_messages.py`).
      max_characters: limit for a question and for an answer.
      shard_bytes: bytes of a file per part.
    """

    kind: ClassVar[str] = "video_chat"
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
        """The chat that entry `number` of the array belongs to, and the name of its video."""

    @abc.abstractmethod
    def turns_of(self, record: dict[str, Any]) -> list[Turn]:
        """The questions and answers of an entry.

        Raises:
          Skip: there are none, or one is empty.
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
            raise UserError(f"{shard}: not one of this reader's shards; expected PATH@PART/PARTS")
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
        except Skip as skip:  # every part sees it, one reports it
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
            images = stored_frames(find_video(folder, video), self.frames)
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
            yield RawDocument(key, self.kind, (*system, *images, *texts))

    def _clean(self, turn: Turn, number: int) -> Turn:
        question, answer = (clean_text(text, self.max_characters) for text in turn)
        if not question or not answer:
            raise Skip("empty_turn", f"the {'answer' if question else 'question'} {number} is empty")
        return question, answer


def make_turn(asked: list[object], answer: object, number: int) -> Turn:
    """The texts of question `number`, joined by line breaks, and its answer.

    Raises:
      Skip: one of them is not a text.
    """
    texts = [text for text in asked if isinstance(text, str)]
    if len(texts) < len(asked) or not isinstance(answer, str):
        raise Skip("empty_turn", f"question {number}: expected texts as q and a")
    return "\n".join(text.strip() for text in texts if text.strip()), answer
