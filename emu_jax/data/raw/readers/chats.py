"""Chats, with or without images or a video: LLaVA's, ShareGPT's, OpenAI's, The Cauldron's; and Alpaca's instructions.

*.json (an array) | *.jsonl | *.parquet | *.arrow ─ Chats ─ RawDocument(key, "chat", (RawImage, Text(…, "user"), …))
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from emu_jax.data.document import Text
from emu_jax.data.frames import STORED
from emu_jax.data.raw.chat_records import Chat, Mark, parse_chat
from emu_jax.data.raw.files import (
    MAX_IMAGE_BYTES,
    Skip,
    check_folder,
    find_shards,
    parse_line,
    read_image,
    shard_name,
)
from emu_jax.data.raw.image_files import data_address
from emu_jax.data.raw.reader import RawDocument, RawImage, Reject
from emu_jax.data.raw.rows import LINES, PATTERNS, read_values, without_twins
from emu_jax.data.system_messages import IMAGE_SYSTEM, VIDEO_SYSTEM
from emu_jax.errors import UserError
from emu_jax.storage import read_lines

EXPECTED = "chats in JSON or JSONL, Parquet or Arrow, as LLaVA, ShareGPT, OpenAI and Alpaca have them"
PIECE_BYTES = 64 << 20  # of a JSONL, per shard
PIECE = re.compile(r"(.+)@(\d+)-(\d+)")


@dataclasses.dataclass(frozen=True)
class Chats:
    """One document per conversation; the texts of a turn carry its role.

    The forms of records are those of `chat_records.py`. An image takes the position of its `<image>`, and belongs to
    the turn of the text after it. A turn that ends in an image therefore gets an empty text of its role at the end. A
    chat about one video becomes a document of the kind `video_chat`, with the video's frames before the first question.
    A chat with one bad turn is left out completely. Answers before the first question are left out, as the reference
    of LLaVA and FastChat do with them: they were given to a question that the record does not hold. A system message
    that is not the first turn leaves out the chat, because a chat has no other place for it, and without it the answers
    after it would follow from nothing.

    Attributes:
      images: folder of the images, relative to the JSON's.
      videos: folder of the videos, relative to the JSON's.
      frames: number of frames stored per video, spread over it; all of a shorter one. Training shows some of them.
      system: whether chats with images or a video and without a system message begin with the paper's
        (`system_messages.py`).
      max_characters: chats with a longer turn are left out.
      piece_bytes: a longer JSONL is divided into shards of this many bytes.
    """

    about: ClassVar[str] = "conversations: LLaVA's, ShareGPT's, OpenAI's, The Cauldron's, Alpaca's"
    kind: ClassVar[str] = "chat"
    images: str = "."
    videos: str = "."
    frames: int = STORED
    system: bool = True
    max_characters: int = 100_000
    piece_bytes: int = PIECE_BYTES

    def __post_init__(self):
        for name in ("frames", "piece_bytes"):
            if getattr(self, name) < 1:
                raise UserError(f"Chats.{name}={getattr(self, name)}; expected at least 1")

    def shards(self, path: str) -> list[str]:
        found = without_twins(find_shards(path, PATTERNS, EXPECTED))
        check_folder("Chats.images", found, self.images)
        check_folder("Chats.videos", found, self.videos)
        shards = []
        for shard in found:
            size = Path(shard).stat().st_size
            if shard.endswith(LINES) and size > self.piece_bytes:
                starts = range(0, size, self.piece_bytes)
                shards += [f"{shard}@{start}-{min(start + self.piece_bytes, size)}" for start in starts]
            else:
                shards.append(shard)
        return shards

    def read(self, shard: str) -> Iterator[RawDocument | Reject]:
        piece = PIECE.fullmatch(shard)
        path, start, end = (piece[1], int(piece[2]), int(piece[3])) if piece else (shard, 0, None)
        if not path.endswith(LINES):
            yield from self._values(path)
            return
        try:
            yield from self._lines(path, start, end)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); expected {EXPECTED}") from error

    def _values(self, path: str) -> Iterator[RawDocument | Reject]:
        folder = Path(path).parent
        for found in read_values(path, digits=9):
            if isinstance(found, Reject):
                yield found
            else:
                yield from self._document(*found, folder)

    def _lines(self, path: str, start: int, end: int | None) -> Iterator[RawDocument | Reject]:
        """The lines that begin in [start, end). A key is the byte at which its line begins, whatever the shards are."""
        name, folder = shard_name(path), Path(path).parent
        with open(path, "rb") as file:
            if start:
                file.seek(start - 1)
                _skip_line(file)
            for line in read_lines(file, start=file.tell(), end=end):
                key = f"{name}/{line.start:012d}"
                try:
                    record = parse_line(line)
                except Skip as skip:
                    if skip.reason == "cut_shard":
                        yield Reject(name, "cut_shard", f"{name} ends within the line at byte {line.start:012d}")
                    else:
                        yield skip.reject(key)
                    continue
                yield from self._document(key, record, folder)

    # ------------------------------------------------------------ one chat

    def _document(self, key: str, record: Any, folder: Path) -> Iterator[RawDocument | Reject]:
        try:
            chat = parse_chat(record, self.max_characters)
            document = self._video_chat(key, chat, folder) if chat.videos else self._chat(key, chat, folder)
            if chat.leading:
                detail = f"{chat.leading} answers before the first question"
                yield Reject(f"{key}#leading", "leading_answer", detail, whole=False)
            yield document
        except Skip as skip:
            yield skip.reject(key)

    def _chat(self, key: str, chat: Chat, folder: Path) -> RawDocument:
        images = (RawImage(_image(folder / self.images, name)) for name in chat.images)
        parts = self._system(chat, IMAGE_SYSTEM) if chat.images else []
        for turn in chat.turns:
            parts += [next(images) if isinstance(piece, Mark) else Text(piece, turn.role) for piece in turn.pieces]
            if isinstance(turn.pieces[-1], Mark):
                parts.append(Text("", turn.role))
        return RawDocument(key, self.kind, tuple(parts))

    def _video_chat(self, key: str, chat: Chat, folder: Path) -> RawDocument:
        """A chat about one video, whose frames come before the first question."""
        try:
            from emu_jax.data.raw.video_files import find_video, stored_frames  # on demand: chats need no PyAV
        except ImportError as error:
            raise UserError(f"{key}: chats about videos need PyAV ({error}); run `pip install av`") from error
        first = next(turn for turn in chat.turns if turn.role == "user")
        marks = [place for place, piece in enumerate(first.pieces) if isinstance(piece, Mark)]
        if chat.images or len(chat.videos) > 1:
            shown = f"{len(chat.videos)} videos and {len(chat.images)} images"
            raise Skip("unread_field", f"the chat shows {shown}; one video alone, or images, are read")
        if marks not in ([0], [len(first.pieces) - 1]):
            raise Skip(
                "unread_field", "the video is shown within a question, or after the first one; it is not read there"
            )
        frames = stored_frames(find_video(folder / self.videos, _path(chat.videos[0], "video")), self.frames)
        texts = [Text(piece, turn.role) for turn in chat.turns for piece in turn.pieces if isinstance(piece, str)]
        if texts[0].role == "system":
            return RawDocument(key, "video_chat", (texts[0], *frames, *texts[1:]))
        return RawDocument(key, "video_chat", (*self._system(chat, VIDEO_SYSTEM), *frames, *texts))

    def _system(self, chat: Chat, message: str) -> list[Text | RawImage]:
        return [Text(message, "system")] if self.system and chat.turns[0].role != "system" else []


def _image(folder: Path, name: Any) -> bytes:
    """An image that a chat shows, encoded.

    Raises:
      Skip: it is not there, or too large.
    """
    if isinstance(name, dict):
        name = name.get("bytes") or name.get("path")
    if isinstance(name, str) and name[:5].lower() == "data:":
        name = data_address(name)
    if isinstance(name, bytes):
        if len(name) > MAX_IMAGE_BYTES:
            raise Skip("image_too_large", f"{len(name)} bytes; at most {MAX_IMAGE_BYTES} are read")
        return name
    return read_image(folder, _path(name, "image"))


def _path(name: Any, what: str) -> Any:
    """A name of a file; whether it is one is checked where it is opened.

    Raises:
      Skip: it is an address.
    """
    if isinstance(name, str) and "://" in name:
        raise Skip(f"missing_{what}", f"{ascii(name)[:200]} is an address, and none is fetched; name a downloaded file")
    return name


def _skip_line(file: Any) -> None:
    """Reads to the start of the next line."""
    while (part := file.readline(1 << 20)) and not part.endswith(b"\n"):
        pass


READER = Chats
