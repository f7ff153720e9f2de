"""Chats: LLaVA's and ShareGPT's conversations, with or without images, and Alpaca's instructions.

{"image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"}, {"from": "gpt", …}]}
{"instruction": "Translate.", "input": "Hund", "output": "dog"}

*.json (an array) | *.jsonl ─ Chats ─ RawDocument(key, "chat", (RawImage, Text(…, "user"), Text(…, "assistant")))
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from emu_jax.data.document import Text
from emu_jax.data.raw.files import (
    MAX_RECORD_CHARACTERS,
    Skip,
    check_folder,
    clean_text,
    find_shards,
    json_array,
    parse_json,
    read_image,
    shard_name,
)
from emu_jax.data.raw.reader import RawDocument, RawImage, Reject
from emu_jax.data.system_messages import IMAGE_SYSTEM
from emu_jax.errors import UserError

PLACEHOLDER = "<image>"
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
PIECE_BYTES = 64 << 20  # of a JSONL, per shard
PIECE = re.compile(r"(.+)@(\d+)-(\d+)")


@dataclasses.dataclass(frozen=True)
class Chats:
    """One document per conversation; the texts of a turn carry its role.

    An image takes the position of its `<image>`, and belongs to the turn of the text after it. A turn that ends in an
    image therefore gets an empty text of its role at the end. A chat with one bad turn is left out completely.

    Attributes:
      images: folder of the images, relative to the JSON's.
      system: whether chats with images and without a system message begin with the paper's (`system_messages.py`).
      max_characters: chats with a longer turn are left out.
      piece_bytes: a longer JSONL is divided into shards of this many bytes.
    """

    about: ClassVar[str] = "conversations: LLaVA's, ShareGPT's, Alpaca's JSON"
    kind: ClassVar[str] = "chat"
    images: str = "."
    system: bool = True
    max_characters: int = 100_000
    piece_bytes: int = PIECE_BYTES

    def __post_init__(self):
        if self.piece_bytes < 1:
            raise UserError(f"Chats.piece_bytes={self.piece_bytes}; expected at least 1")

    def shards(self, path: str) -> list[str]:
        found = find_shards(
            path, ("*.json", "*.jsonl"), "chats in JSON or JSONL, as LLaVA, ShareGPT and Alpaca have them"
        )
        check_folder("Chats.images", found, self.images)
        shards = []
        for shard in found:
            size = Path(shard).stat().st_size
            if shard.endswith(".jsonl") and size > self.piece_bytes:
                starts = range(0, size, self.piece_bytes)
                shards += [f"{shard}@{start}-{min(start + self.piece_bytes, size)}" for start in starts]
            else:
                shards.append(shard)
        return shards

    def read(self, shard: str) -> Iterator[RawDocument | Reject]:
        piece = PIECE.fullmatch(shard)
        path, start, end = (piece[1], int(piece[2]), int(piece[3])) if piece else (shard, 0, None)
        try:
            yield from self._lines(path, start, end) if path.endswith(".jsonl") else self._array(path)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); expected chats in JSON or JSONL") from error

    def _array(self, path: str) -> Iterator[RawDocument | Reject]:
        name, folder = shard_name(path), Path(path).parent / self.images
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            try:
                for number, record in enumerate(json_array(file)):
                    yield self._document(f"{name}/{number:09d}", record, folder)
            except Skip as skip:
                yield skip.reject(name)

    def _lines(self, path: str, start: int, end: int | None) -> Iterator[RawDocument | Reject]:
        """The lines that begin in [start, end). A key is the byte at which its line begins, whatever the shards are."""
        name, folder = shard_name(path), Path(path).parent / self.images
        with open(path, "rb") as file:
            if start:
                file.seek(start - 1)
                _skip_line(file)
            while end is None or file.tell() < end:
                key = f"{name}/{file.tell():012d}"
                line = file.readline(MAX_RECORD_CHARACTERS)
                if not line:
                    return
                if len(line) == MAX_RECORD_CHARACTERS and not line.endswith(b"\n"):
                    _skip_line(file)
                    yield Reject(key, "unreadable_json", f"a line of more than {MAX_RECORD_CHARACTERS} bytes")
                    continue
                if not line.strip():
                    continue
                try:
                    record = parse_json(line)
                except Skip as skip:
                    if line.endswith(b"\n"):
                        yield Reject(key, "unreadable_json", skip.detail)
                    else:
                        yield Reject(name, "cut_shard", f"{name} ends within the line at byte {key[-12:]}")
                    continue
                yield self._document(key, record, folder)

    # ------------------------------------------------------------ one chat

    def _document(self, key: str, record: Any, folder: Path) -> RawDocument | Reject:
        try:
            if isinstance(record, dict) and "conversations" in record:
                parts = self._conversation(record, folder)
            elif isinstance(record, dict) and {"instruction", "output"} <= record.keys():
                parts = self._instruction(record)
            else:
                raise Skip("not_a_chat", "expected an object with conversations, or instruction and output")
            return RawDocument(key, self.kind, tuple(parts))
        except Skip as skip:
            return skip.reject(key)

    def _instruction(self, record: dict[str, Any]) -> list[Text | RawImage]:
        fields = [record["instruction"], record.get("input") or "", record["output"]]
        if not all(isinstance(field, str) for field in fields):
            raise Skip("not_a_chat", "expected texts as instruction, input and output")
        instruction, more, output = (clean_text(field, self.max_characters) for field in fields)
        if not instruction or not output:
            raise Skip("empty_turn", "the instruction is empty" if output else "the output is empty")
        return [Text(f"{instruction}\n{more}" if more else instruction, "user"), Text(output, "assistant")]

    def _conversation(self, record: dict[str, Any], folder: Path) -> list[Text | RawImage]:
        names = record.get("image", [])
        names = names if isinstance(names, list) else [] if names is None else [names]
        turns = [self._turn(turn, number) for number, turn in enumerate(_turns(record), 1)]
        places = sum(piece is None for _, pieces in turns for piece in pieces)
        if places != len(names):
            raise Skip("images_differ", f"{places} x {PLACEHOLDER}, {len(names)} images")
        if not any(role == "assistant" for role, _ in turns):
            raise Skip("no_answer", "the assistant has no turn")
        images = (RawImage(read_image(folder, name)) for name in names)
        add_system = names and self.system and not any(role == "system" for role, _ in turns)
        parts: list[Text | RawImage] = [Text(IMAGE_SYSTEM, "system")] if add_system else []
        for role, pieces in turns:
            parts += [next(images) if piece is None else Text(piece, role) for piece in pieces]
            if pieces[-1] is None:
                parts.append(Text("", role))
        return parts

    def _turn(self, turn: Any, number: int) -> tuple[str, list[str | None]]:
        """The role, and the texts of a turn, with None at the position of each image."""
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise Skip("empty_turn", f"turn {number} has no value")
        sender = turn.get("from")
        role = ROLES.get(sender) if isinstance(sender, str) else None
        if role is None:
            raise Skip("unknown_role", f"turn {number} is from {sender!a:.40}; known: {', '.join(ROLES)}")
        pieces: list[str | None] = []
        for n, text in enumerate(turn["value"].split(PLACEHOLDER)):
            if n > 0:
                pieces.append(None)
            # White space beside an image is dropped: the image's delimiters separate it from the text.
            if text := clean_text(text, self.max_characters):
                pieces.append(text)
        if not pieces:
            raise Skip("empty_turn", f"turn {number} is empty")
        return role, pieces


def _turns(record: dict[str, Any]) -> list[Any]:
    turns = record["conversations"]
    if not isinstance(turns, list) or not turns:
        raise Skip("no_turns", "conversations is not a list of turns, or is empty")
    system = record.get("system")
    return [{"from": "system", "value": system}, *turns] if system else turns


def _skip_line(file: Any) -> None:
    """Reads to the start of the next line."""
    while (part := file.readline(1 << 20)) and not part.endswith(b"\n"):
        pass


READER = Chats
