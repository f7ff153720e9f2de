"""A JSONL of pairs and documents that is trained on as it is: its lines as records, and rejects for the others.

    {"image": "cat.png", "text": "a cat"}                                     ─ (True, [image, text])
    {"parts": [{"text": "first"}, {"image": "a.png"}, {"text": "then"}]}      ─ (False, [text, image, text])

The reasons of rejects are those of `emu-jax prepare`.
"""

from __future__ import annotations

import collections
import dataclasses
import io
from collections.abc import Mapping
from typing import Any

from emu_jax.data.raw import compressed
from emu_jax.data.raw.files import Skip
from emu_jax.errors import UserError, shown
from emu_jax.storage import JsonFault, Path, as_path, decode_json, read_lines

SUFFIXES = tuple(f"{end}{packed}" for end in (".jsonl", ".ndjson") for packed in ("", *compressed.SUFFIXES))
MAX_BYTES = 4 << 30  # of a file that is unpacked, which is kept in memory
JsonlRecord = tuple[bool, list[tuple[str, str]]]  # whether it is a pair, and its parts as (text or image, value)
SHAPE = '{"image": …, "text": …} or {"parts": [{"text": …}, …]}'
# Fields that would make another document of a line, and which are not read.
UNREAD = ("images", "video", "videos", "audio", "audios", "conversations", "messages")
EMPTY: tuple[object, ...] = (None, "", [])
MAX_NAME_BYTES = 255  # of a file, on Linux


@dataclasses.dataclass(frozen=True)
class JsonlLines:
    """The records of a file, and what was left out.

    Attributes:
      records: by the number of their line, from 1.
      rejects: number of lines that were left out, by reason.
      first: the first of them, with its place and what is wrong; "" if there is none.
    """

    records: Mapping[int, JsonlRecord]
    rejects: Mapping[str, int]
    first: str

    def remark(self, path: Path) -> str:
        """A line about the lines that were left out; "" if there are none."""
        left_out = sum(self.rejects.values())
        if not left_out:
            return ""
        counts = ", ".join(f"{reason} {count:,}" for reason, count in sorted(self.rejects.items()))
        lines = left_out + len(self.records)
        return f"{path}: {left_out:,} of {lines:,} lines left out ({counts}); the first: {self.first}"


def read_unpacked(path: Path) -> bytes:
    """The contents of a file whose name ends in one of `SUFFIXES`, unpacked.

    Raises:
      UserError: it is cut, or too large.
    """
    suffix = next((suffix for suffix in compressed.SUFFIXES if path.name.endswith(suffix)), "")
    data = path.read_bytes()
    if not suffix:
        return data
    try:
        data = compressed.unpacked(io.BufferedReader(io.BytesIO(data)), suffix).read(MAX_BYTES + 1)
    except compressed.CutError as error:
        raise UserError(f"config.data.source {path}: cannot be unpacked ({error}); copy it again") from error
    if len(data) > MAX_BYTES:
        raise UserError(f"config.data.source {path}: more than {MAX_BYTES >> 30} GB unpacked; prepare it once instead")
    return data


def read_documents(path: Path, data: bytes, max_faults: float) -> JsonlLines:
    """Reads the lines of `data`, the contents of `path`.

    Args:
      max_faults: share of the lines that may be left out; with 0 the first fault is an error of its own.

    Raises:
      UserError: more lines are faulty, or there are no documents; names the file and the first such line.
    """
    records: dict[int, JsonlRecord] = {}
    rejects: collections.Counter[str] = collections.Counter()
    first = ""
    for line in read_lines(io.BytesIO(data), most=len(data)):
        try:
            records[line.number] = parse_document(decode_json(line.data), path)
        except (JsonFault, Skip) as fault:
            where = f"{path}:{line.number}: {fault}"
            if not max_faults:
                raise UserError(where) from fault
            rejects[fault.reason] += 1
            first = first or where
    found = JsonlLines(records, rejects, first)
    if rejects and sum(rejects.values()) > max_faults * (len(records) + sum(rejects.values())):
        raise UserError(
            f"config.data.source {found.remark(path)}; these are more than max_faults={max_faults:g}; "
            "mend the lines, or raise it"
        )
    if not records:
        raise UserError(f"config.data.source {path}: the file holds no documents")
    return found


def parse_document(value: Any, path: Path) -> JsonlRecord:
    """The document of a line's value.

    Raises:
      Skip: it is none: a field is missing, has another type, or cannot be read.
    """
    if not isinstance(value, dict):
        raise Skip("unreadable_record", f"the line is {shown(value)}; expected {SHAPE}")
    is_pair = {"image", "text"} <= value.keys()
    if not is_pair and not isinstance(value.get("parts"), list):
        raise Skip("unreadable_record", f"its fields are {ascii(sorted(value))[:80]}; expected {SHAPE}")
    unread = (*UNREAD, "parts") if is_pair else (*UNREAD, "image", "text")
    if found := next((name for name in unread if value.get(name) not in EMPTY), None):
        raise Skip("unread_field", f"{found} is not read here; expected {SHAPE}")
    if is_pair:
        return True, [("image", _image(value, "image", path)), ("text", _text(value, "text"))]
    if not value["parts"]:
        raise Skip("unreadable_record", f"parts is a list of 0; expected {SHAPE}")
    parts = []
    for number, part in enumerate(value["parts"]):
        if not isinstance(part, dict) or len(part) != 1 or next(iter(part)) not in ("text", "image"):
            found = ascii(sorted(part))[:60] if isinstance(part, dict) else shown(part)
            raise Skip("unreadable_record", f'parts[{number}] is {found}; expected {{"text": …}} or {{"image": …}}')
        kind = next(iter(part))
        where = f"parts[{number}]."
        parts.append((kind, _image(part, kind, path, where) if kind == "image" else _text(part, kind, where)))
    return False, parts


def image_path(name: str, path: Path) -> Path:
    """The file of an image that the JSONL `path` names: relative to it, or with a scheme of its own."""
    return as_path(name) if "://" in name else path.parent / name


def _text(fields: Mapping[str, Any], name: str, where: str = "") -> str:
    if not isinstance(fields[name], str):
        raise Skip("unreadable_record", f"{where}{name} is {shown(fields[name])}; expected a text")
    return fields[name]


def _image(fields: Mapping[str, Any], name: str, path: Path, where: str = "") -> str:
    value = fields[name]
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise Skip("unreadable_record", f"{where}{name} is {shown(value)}; expected the name of an image file")
    if any(len(part.encode()) > MAX_NAME_BYTES for part in value.split("/")):
        raise Skip("missing_image", f"{where}{name} is {shown(value)}, too long for the name of a file")
    try:
        image_path(value, path)
    except UserError as error:
        raise Skip("missing_image", str(error)) from error
    return value
