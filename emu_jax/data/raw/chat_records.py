"""A chat's record in one of its published forms -> its turns, with marks where images and videos are shown.

{"conversations": [{"from": "human", "value": "<image>\\nWhat?"}, …], "image": "a.jpg"}             LLaVA, ShareGPT
{"messages": [{"role": "user", "content": [{"type": "image_url", …}, {"type": "text", …}]}, …]}     OpenAI
{"texts": [{"user": "What?", "assistant": "A dog."}, …], "images": [{"bytes": …, "path": …}]}       The Cauldron
{"instruction": "Translate.", "input": "Hund", "output": "dog", "system": …, "history": [["Hi", "Hello"]]}   Alpaca

                              record ─ parse_chat ─ Chat(turns, images, videos)
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

from emu_jax.data.raw.files import Skip, clean_text
from emu_jax.errors import shown

IMAGE, VIDEO = "<image>", "<video>"
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "developer": "system",
}
# Fields of a record and of a turn without which a chat says something else, and which are not read.
UNREAD = ("audio", "audios", "tools", "functions", "chosen", "rejected", "kto_tag")
UNREAD_IN_TURN = ("tool_calls", "function_call", "refusal", "audio")
# Values with which a field says nothing; tools are JSON in a text.
EMPTY: tuple[object, ...] = (None, "", [], {}, False, "[]", "{}")
UNREAD_PLACEHOLDERS = (VIDEO, "<audio>", "<speech>")  # where a turn begins or ends with one; elsewhere they are text
UNLEARNT = ("weight", "loss", "train")  # fields of a turn that, where they are false or 0, exclude it from the loss
# Parts of a message: their types, and the fields that hold what they show.
TEXT_PARTS = ("text", "input_text", "output_text")
IMAGE_PARTS = ("image_url", "input_image", "image")
VIDEO_PARTS = ("video_url", "video")
NAMES = ("url", "path", "bytes")


@dataclasses.dataclass(frozen=True)
class Mark:
    """The position of an image or a video.

    Attributes:
      what: `IMAGE` or `VIDEO`.
      name: what is shown: a name, a data: URL, bytes, or Hugging Face's {bytes, path}; None for the record's next one.
      index: number of the record's image or video that it has to be, from 0, where the record states it.
    """

    what: str
    name: Any = None
    index: int | None = None


@dataclasses.dataclass(frozen=True)
class Turn:
    """What one speaker says.

    Attributes:
      role: "user", "assistant" or "system".
      pieces: texts and marks in order; at least one.
    """

    role: str
    pieces: tuple[str | Mark, ...]


@dataclasses.dataclass(frozen=True)
class Chat:
    """A chat whose turns are in order: a system message if it has one, then a question and its answer in turns.

    Attributes:
      images, videos: what the marks show, in order; as `Mark.name`.
      leading: number of answers before the first question, which are not among the turns.
    """

    turns: tuple[Turn, ...]
    images: tuple[Any, ...]
    videos: tuple[Any, ...]
    leading: int = 0


def parse_chat(record: Any, max_characters: int) -> Chat:
    """The chat of a record.

    Raises:
      Skip: it is none, or one that cannot be read as it is meant.
    """
    if not isinstance(record, dict):
        raise Skip("not_a_chat", f"expected an object, found {shown(record)}")
    if found := next((name for name in UNREAD if record.get(name) not in EMPTY), None):
        raise Skip("unread_field", f"the field {found} changes what the chat says, and is not read")
    images, videos = _names(record, "image"), _names(record, "video")
    turns = [_turn(turn, number, max_characters, bool(videos)) for number, turn in enumerate(_turns(record), 1)]
    led = next((n for n, turn in enumerate(turns) if turn.role != "system"), len(turns))
    first = next((n for n, turn in enumerate(turns) if turn.role == "user"), len(turns))
    leading, kept = turns[led:first], turns[:led] + turns[first:]
    _check_order(kept, leading)
    marks = [piece for turn in kept for piece in turn.pieces if isinstance(piece, Mark)]
    if len(videos) == 1 and not images and [mark.what for mark in marks] == [IMAGE]:  # as LLaVA-Video marks them
        marks = [dataclasses.replace(marks[0], what=VIDEO)]
    chat = Chat(
        tuple(kept),
        _resolved([mark for mark in marks if mark.what == IMAGE], images, "image"),
        _resolved([mark for mark in marks if mark.what == VIDEO], videos, "video"),
        len(leading),
    )
    if not any(turn.role == "assistant" for turn in kept):
        raise Skip("no_answer", "the assistant has no turn after a question")
    return chat


def _resolved(marks: Sequence[Mark], names: Sequence[Any], what: str) -> tuple[Any, ...]:
    """What is shown at the marks: what they name themselves, and the record's images or videos at the others."""
    unnamed = sum(mark.name is None for mark in marks)
    if unnamed != len(names):
        raise Skip("images_differ", f"{unnamed} x <{what}>, {len(names)} {what}s")
    for number, mark in enumerate(mark for mark in marks if mark.name is None):
        if mark.index not in (None, number):
            raise Skip("images_differ", f"a part shows {what} {mark.index} at the position of {what} {number}")
    left = iter(names)
    return tuple(next(left) if mark.name is None else mark.name for mark in marks)


def _check_order(turns: Sequence[Turn], leading: Sequence[Turn]) -> None:
    """Raises unless at most one system message comes first, and question and answer take turns after it.

    Args:
      leading: answers before the first question, which are left out.
    """
    if any(turn.role == "system" for turn in (*leading, *turns[1:])):
        raise Skip("misplaced_system", "a system message that is not the first turn")
    if any(isinstance(piece, Mark) for turn in leading for piece in turn.pieces):
        raise Skip("leading_answer", "an answer before the first question shows an image")
    for number, (before, after) in enumerate(itertools.pairwise(turn.role for turn in turns), 1):
        if before == after:
            raise Skip("repeated_role", f"turns {number} and {number + 1} are both the {after}'s")


# ---------------------------------------------------------------- a record's fields


def _turns(record: dict[str, Any]) -> list[Any]:
    """The turns of a record as ShareGPT or OpenAI have them, with the record's system message first."""
    lists = [name for name in ("conversations", "messages") if record.get(name) is not None]
    if len(lists) == 2 and record["conversations"] != record["messages"]:
        raise Skip("not_a_chat", "it has both conversations and messages; expected one of them")
    if lists:
        turns = _rows(record[lists[0]])
        if not isinstance(turns, list) or not turns:
            raise Skip("no_turns", f"{lists[0]} is not a list of turns, or is empty")
    elif {"instruction", "output"} <= record.keys():
        turns = _instruction(record)
    elif "texts" in record:
        turns = _questions(record)
    elif "conversations" in record or "messages" in record:
        raise Skip("no_turns", "it has no turns")
    else:
        raise Skip("not_a_chat", "expected an object with conversations, messages, texts, or instruction and output")
    system = record.get("system")
    return [{"from": "system", "value": system}, *turns] if system else turns


def _rows(turns: Any) -> Any:
    """A list of objects that a column stores as an object of lists (`datasets.Sequence`), as it was meant."""
    columns = list(turns.values()) if isinstance(turns, dict) else []
    if not all(isinstance(column, list) for column in columns) or len({len(column) for column in columns}) != 1:
        return turns
    return [dict(zip(turns, row, strict=True)) for row in zip(*columns, strict=True)]


def _instruction(record: dict[str, Any]) -> list[dict[str, str]]:
    """Alpaca's earlier questions and answers, and its instruction, input and output, as turns."""
    history = record.get("history") or []
    if not isinstance(history, list):
        raise Skip("not_a_chat", f"history is {shown(history)}; expected a list")
    asked: list[tuple[Any, Any]] = []
    for number, pair in enumerate(history, 1):
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


def _questions(record: dict[str, Any]) -> list[dict[str, str]]:
    """The Cauldron's questions and answers as turns; its images come before the first question.

    Its readers (Idefics2's, by its data set's page) show all images of a record first.
    """
    pairs = _rows(record["texts"])
    if not isinstance(pairs, list) or not pairs:
        raise Skip("no_turns", "texts is not a list of questions and answers, or is empty")
    turns: list[dict[str, str]] = []
    for number, pair in enumerate(pairs, 1):
        for who in ("user", "assistant"):
            text = pair.get(who) if isinstance(pair, dict) else None
            if not isinstance(text, str):
                raise Skip("not_a_chat", f"texts {number} is {shown(pair)}; expected the fields user and assistant")
            turns.append({"from": who, "value": text})
    if not any(IMAGE in turn["value"] for turn in turns):
        turns[0]["value"] = IMAGE * len(_names(record, "image")) + turns[0]["value"]
    return turns


def _names(record: dict[str, Any], what: str) -> list[Any]:
    """The names in the fields image and images, or video and videos; an empty one is none."""
    found = []
    for field in (what, f"{what}s"):
        names = record.get(field)
        names = names if isinstance(names, list) else [names]
        if names := [name for name in names if name is not None and name != ""]:
            found.append(names)
    if len(found) == 2 and found[0] != found[1]:
        raise Skip("images_differ", f"the fields {what} and {what}s name different {what}s")
    return found[0] if found else []


# ---------------------------------------------------------------- a turn


def _turn(turn: Any, number: int, max_characters: int, has_video: bool) -> Turn:
    if not isinstance(turn, dict):
        raise Skip("empty_turn", f"turn {number} is {shown(turn)}; expected an object")
    sender = turn.get("role") if turn.get("from") is None else turn["from"]
    role = ROLES.get(sender) if isinstance(sender, str) else None
    if found := next((name for name in UNREAD_IN_TURN if turn.get(name) not in EMPTY), None):
        raise Skip("unread_field", f"turn {number} has {found}, which is not read")
    if found := next((name for name in UNLEARNT if turn.get(name) is not None and not turn[name]), None):
        raise Skip("unread_field", f"turn {number} has {found}={shown(turn[found])}, and is not to be learnt")
    content = turn.get("content") if turn.get("value") is None else turn["value"]
    if isinstance(content, list):
        pieces = _parts(content, number, has_video)
    elif isinstance(content, str):
        pieces = _marked(content, number, has_video)
    else:
        found = shown(content) if "value" in turn or "content" in turn else "no value"
        raise Skip("empty_turn", f"turn {number} has {found}; expected a text")
    if role is None:
        raise Skip("unknown_role", f"turn {number} is from {sender!a:.40}; known: {', '.join(ROLES)}")
    # White space beside an image is dropped: the image's delimiters separate it from the text.
    cleaned = [piece if isinstance(piece, Mark) else clean_text(piece, max_characters) for piece in pieces]
    kept = tuple(piece for piece in cleaned if piece)
    if not kept:
        raise Skip("empty_turn", f"turn {number} is empty")
    return Turn(role, kept)


def _marked(text: str, number: int, has_video: bool) -> list[str | Mark]:
    """A text's pieces between its placeholders."""
    inner, before, after = text.strip(), [], []
    if has_video and inner.startswith(VIDEO):
        inner, before = inner.removeprefix(VIDEO), [Mark(VIDEO)]
    elif has_video and inner.endswith(VIDEO):
        inner, after = inner.removesuffix(VIDEO), [Mark(VIDEO)]
    end = inner.strip()
    if found := next((p for p in UNREAD_PLACEHOLDERS if end.startswith(p) or end.endswith(p)), None):
        raise Skip("unread_field", f"turn {number} shows {found}, which is not read")
    pieces: list[str | Mark] = []
    for n, piece in enumerate(inner.split(IMAGE)):
        pieces += [piece] if n == 0 else [Mark(IMAGE), piece]
    return [*before, *pieces, *after]


def _parts(parts: Sequence[Any], number: int, has_video: bool) -> list[str | Mark]:
    """The pieces of a message that is a list of parts; texts beside each other are joined by a line break."""
    pieces: list[str | Mark] = []
    for part in parts:
        for piece in _part(part, number, has_video):
            if isinstance(piece, str) and pieces and isinstance(pieces[-1], str):
                pieces[-1] = f"{pieces[-1]}\n{piece}"
            else:
                pieces.append(piece)
    return pieces


def _part(part: Any, number: int, has_video: bool) -> list[str | Mark]:
    if isinstance(part, str):
        return _marked(part, number, has_video)
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in TEXT_PARTS and isinstance(part.get("text"), str):
        return _marked(part["text"], number, has_video)
    for what, kinds in ((IMAGE, IMAGE_PARTS), (VIDEO, VIDEO_PARTS)):
        if kind in kinds:
            return [Mark(what, _shown_by(part, kinds), part.get("index"))]
    if kind is None or kind in TEXT_PARTS:
        raise Skip("not_a_chat", f"turn {number} has {shown(part)} among its parts; expected a text or an image")
    raise Skip("unread_field", f"turn {number} has a part of type {kind!a:.40}, which is not read")


def _shown_by(part: dict[str, Any], kinds: Sequence[str]) -> Any:
    """What a part names, such as {"type": "image_url", "image_url": {"url": …}}; None for the record's next one."""
    for field in (*kinds, *NAMES):
        value = part.get(field)
        if isinstance(value, dict) and "url" in value:
            value = value["url"]
        if value not in (None, "", {}):
            return value
    return None
