"""Chats: LLaVA's and ShareGPT's conversations, with or without images, and Alpaca's instructions.

{"image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"}, {"from": "gpt", …}]}
{"instruction": "Translate.", "input": "Hund", "output": "dog", "system": "Be brief.", "history": [["Hi", "Hello"]]}

*.json (an array) | *.jsonl ─ Chats ─ RawDocument(key, "chat", (RawImage, Text(…, "user"), Text(…, "assistant")))
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

from emu_jax.data.document import Text
from emu_jax.data.raw.files import (
    Skip,
    check_folder,
    clean_text,
    find_shards,
    json_array,
    parse_line,
    read_image,
    shard_name,
)
from emu_jax.data.raw.reader import RawDocument, RawImage, Reject
from emu_jax.data.system_messages import IMAGE_SYSTEM
from emu_jax.errors import UserError, shown
from emu_jax.storage import read_lines

PLACEHOLDER = "<image>"
Turn = tuple[str, list[str | None]]  # role, and the texts of a turn with None at the position of each image
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
# Fields without which a chat says something else, and which are not read.
UNREAD = ("video", "videos", "audio", "audios", "tools", "functions", "chosen", "rejected", "kto_tag")
EMPTY: tuple[object, ...] = (
    None,
    "",
    [],
    {},
    False,
    "[]",
    "{}",
)  # values with which a field says nothing; tools are JSON in a text
UNREAD_PLACEHOLDERS = (
    "<video>",
    "<audio>",
    "<speech>",
)  # where a turn begins or ends with one; elsewhere they are text
UNLEARNT = ("weight", "loss", "train")  # fields of a turn that, where they are false or 0, exclude it from the loss
PIECE_BYTES = 64 << 20  # of a JSONL, per shard
PIECE = re.compile(r"(.+)@(\d+)-(\d+)")


@dataclasses.dataclass(frozen=True)
class Chats:
    """One document per conversation; the texts of a turn carry its role.

    An image takes the position of its `<image>`, and belongs to the turn of the text after it. A turn that ends in an
    image therefore gets an empty text of its role at the end. A chat with one bad turn is left out completely. Answers
    before the first question are left out, as the reference of LLaVA and FastChat do with them: they were given to a
    question that the record does not hold. A system message that is not the first turn leaves out the chat, because a
    chat has no other place for it, and without it the answers after it would follow from nothing.

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
                    yield from self._document(f"{name}/{number:09d}", record, folder)
            except Skip as skip:
                yield skip.reject(name)

    def _lines(self, path: str, start: int, end: int | None) -> Iterator[RawDocument | Reject]:
        """The lines that begin in [start, end). A key is the byte at which its line begins, whatever the shards are."""
        name, folder = shard_name(path), Path(path).parent / self.images
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
            if not isinstance(record, dict):
                raise Skip("not_a_chat", f"expected an object, found {shown(record)}")
            if found := next((name for name in UNREAD if record.get(name) not in EMPTY), None):
                raise Skip("unread_field", f"the field {found} changes what the chat says, and is not read")
            turns = [self._turn(turn, number) for number, turn in enumerate(_turns(record), 1)]
            led = next((n for n, (role, _) in enumerate(turns) if role != "system"), len(turns))
            first = next((n for n, (role, _) in enumerate(turns) if role == "user"), len(turns))
            leading = turns[led:first]
            _check_order(turns[:led] + turns[first:], leading)
            parts = self._parts(turns[:led] + turns[first:], _image_names(record), folder)
            if leading:
                detail = f"{len(leading)} answers before the first question"
                yield Reject(f"{key}#leading", "leading_answer", detail, whole=False)
            yield RawDocument(key, self.kind, tuple(parts))
        except Skip as skip:
            yield skip.reject(key)

    def _parts(self, turns: Sequence[Turn], names: Sequence[object], folder: Path) -> list[Text | RawImage]:
        places = sum(piece is None for _, pieces in turns for piece in pieces)
        if places != len(names):
            raise Skip("images_differ", f"{places} x {PLACEHOLDER}, {len(names)} images")
        if not any(role == "assistant" for role, _ in turns):
            raise Skip("no_answer", "the assistant has no turn after a question")
        images = (RawImage(read_image(folder, name)) for name in names)
        add_system = names and self.system and not any(role == "system" for role, _ in turns)
        parts: list[Text | RawImage] = [Text(IMAGE_SYSTEM, "system")] if add_system else []
        for role, pieces in turns:
            parts += [next(images) if piece is None else Text(piece, role) for piece in pieces]
            if pieces[-1] is None:
                parts.append(Text("", role))
        return parts

    def _turn(self, turn: Any, number: int) -> Turn:
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            found = shown(turn.get("value")) if isinstance(turn, dict) and "value" in turn else "no value"
            raise Skip("empty_turn", f"turn {number} has {found}; expected a text as its value")
        sender = turn.get("from")
        role = ROLES.get(sender) if isinstance(sender, str) else None
        if role is None:
            raise Skip("unknown_role", f"turn {number} is from {sender!a:.40}; known: {', '.join(ROLES)}")
        value = turn["value"].strip()
        if found := next((p for p in UNREAD_PLACEHOLDERS if value.startswith(p) or value.endswith(p)), None):
            raise Skip("unread_field", f"turn {number} shows {found}, which is not read")
        if found := next((name for name in UNLEARNT if name in turn and not turn[name]), None):
            raise Skip("unread_field", f"turn {number} has {found}={shown(turn[found])}, and is not to be learnt")
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
    """The turns of a record as ShareGPT has them, with its system message first."""
    if "conversations" in record:
        turns = record["conversations"]
        if not isinstance(turns, list) or not turns:
            raise Skip("no_turns", "conversations is not a list of turns, or is empty")
    elif {"instruction", "output"} <= record.keys():
        turns = _instruction(record)
    else:
        raise Skip("not_a_chat", "expected an object with conversations, or instruction and output")
    system = record.get("system")
    return [{"from": "system", "value": system}, *turns] if system else turns


def _instruction(record: dict[str, Any]) -> list[dict[str, str]]:
    """Alpaca's earlier questions and answers, and its instruction, input and output, as turns."""
    asked: list[tuple[Any, Any]] = []
    for number, pair in enumerate(record.get("history") or [], 1) if _is_list(record, "history") else ():
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise Skip("not_a_chat", f"history {number} is {shown(pair)}; expected a question and its answer")
        asked.append((pair[0], pair[1]))
    fields = [record["instruction"], record.get("input") or "", record["output"]]
    if not all(isinstance(field, str) for field in [*fields, *(text for pair in asked for text in pair)]):
        raise Skip("not_a_chat", "expected texts as instruction, input and output, and in history")
    instruction, more, output = (field.replace("\0", "").strip() for field in fields)
    if not instruction or not output:
        raise Skip("empty_turn", "the instruction is empty" if output else "the output is empty")
    asked.append((f"{instruction}\n{more}" if more else instruction, output))
    return [{"from": who, "value": text} for pair in asked for who, text in zip(("human", "gpt"), pair, strict=True)]


def _is_list(record: dict[str, Any], name: str) -> bool:
    if record.get(name) and not isinstance(record[name], list):
        raise Skip("not_a_chat", f"{name} is {shown(record[name])}; expected a list")
    return True


def _image_names(record: dict[str, Any]) -> list[object]:
    """The names in the fields image and images; an empty one is none."""
    found = []
    for field in ("image", "images"):
        names = record.get(field)
        names = names if isinstance(names, list) else [names]
        if names := [name for name in names if name is not None and name != ""]:
            found.append(names)
    if len(found) == 2 and found[0] != found[1]:
        raise Skip("images_differ", "the fields image and images name different images")
    return found[0] if found else []


def _check_order(turns: Sequence[Turn], leading: Sequence[Turn]) -> None:
    """Raises unless at most one system message comes first, and question and answer take turns after it.

    Args:
      leading: answers before the first question, which are left out.
    """
    if any(role == "system" for role, _ in (*leading, *turns[1:])):
        raise Skip("misplaced_system", "a system message that is not the first turn")
    if any(piece is None for _, pieces in leading for piece in pieces):
        raise Skip("leading_answer", "an answer before the first question shows an image")
    for number, (before, after) in enumerate(itertools.pairwise(role for role, _ in turns), 1):
        if before == after:
            raise Skip("repeated_role", f"turns {number} and {number + 1} are both the {after}'s")


def _skip_line(file: Any) -> None:
    """Reads to the start of the next line."""
    while (part := file.readline(1 << 20)) and not part.endswith(b"\n"):
        pass


READER = Chats
