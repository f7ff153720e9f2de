"""Rows of JSON lines, JSON arrays, Parquet and Arrow, one at a time.

    docs_0.jsonl, .ndjson, .json (also .gz, .zst), .jsonl.zip, .parquet, .arrow ─ read_rows ─ ("docs_0.jsonl/17", {…})

The number in a key counts lines or rows, from 0.
"""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Iterator
from typing import IO, Any

from emu_jax.data.raw import tables
from emu_jax.data.raw.compressed import SUFFIXES, CutError, unpacked
from emu_jax.data.raw.files import Skip, json_array, opened, parse_line, shard_name
from emu_jax.data.raw.reader import Reject
from emu_jax.errors import TransientError, UserError, shown
from emu_jax.storage import read_lines

LINES = (".jsonl", ".ndjson")
TABLE_ROWS = 16  # in memory at once; a row may hold its images
PACKED = (*SUFFIXES, ".zip")
LINE_PATTERNS = tuple(f"*{end}{packed}" for end in LINES for packed in ("", *PACKED))
PATTERNS = (
    *LINE_PATTERNS,
    *(f"*.json{packed}" for packed in ("", *SUFFIXES)),
    *(f"*{suffix}" for suffix in tables.SUFFIXES),
)

KeyedValue = tuple[str, Any]  # key, JSON value
KeyedRow = tuple[str, dict[str, Any]]  # key, object


def without_twins(shards: list[str]) -> list[str]:
    """Leaves out compressed files that are also there uncompressed: their documents would be read twice."""
    names = set(shards)
    return [shard for shard in shards if not any(shard.removesuffix(end) in names - {shard} for end in PACKED)]


def read_rows(shard: str) -> Iterator[KeyedRow | Reject]:
    """The objects of a shard in order, each with its key.

    Raises:
      UserError: the file is gone, or a package that reads it is missing.
    """
    for found in read_values(shard):
        if isinstance(found, Reject) or isinstance(found[1], dict):
            yield found
        else:
            yield Reject(found[0], "unreadable_record", f"expected an object, found {shown(found[1])}")


def read_values(shard: str, digits: int = 0) -> Iterator[KeyedValue | Reject]:
    """The values of a shard in order, each with its key.

    Args:
      digits: least number of digits of a number in a key.

    Raises:
      UserError: as `read_rows`.
    """
    name = shard_name(shard)
    try:
        if name.endswith(tables.SUFFIXES):
            yield from _table(shard, name, digits)
        elif name.endswith(".zip"):
            with opened(shard) as file, zipfile.ZipFile(file) as archive:
                members = [member for member in archive.namelist() if member.endswith((*LINES, ".json"))]
                for member in members:
                    # Published archives hold one file of the same name; in others, the member's name tells them apart.
                    where = name if len(members) == 1 else f"{name}/{member}"
                    with archive.open(member) as stream:
                        yield from _json(stream, where, member, digits)
        else:
            suffix = next((suffix for suffix in SUFFIXES if name.endswith(suffix)), "")
            with opened(shard) as stream:
                yield from _json(
                    unpacked(stream, suffix) if suffix else stream, name, name.removesuffix(suffix), digits
                )
    except TransientError:
        raise
    except (CutError, zipfile.BadZipFile, EOFError, zlib.error, NotImplementedError, RuntimeError) as error:
        yield Reject(name, "cut_shard", f"{name} cannot be unpacked further ({error})")
    except FileNotFoundError as error:
        raise UserError(f"{shard}: no such file; it was there when the shards were listed") from error
    except OSError as error:
        yield Reject(name, "cut_shard", f"{name} cannot be read further ({error.strerror or error})")


def _json(stream: IO[bytes], where: str, name: str, digits: int) -> Iterator[KeyedValue | Reject]:
    if name.endswith(LINES):
        yield from _lines(stream, where, digits)
        return
    text = io.TextIOWrapper(stream, encoding="utf-8", errors="surrogateescape")
    number = 0
    try:
        for value in json_array(text):
            yield f"{where}/{number:0{digits}d}", value
            number += 1
    except Skip as skip:
        yield Reject(where, skip.reason, f"{where} cannot be read after {number} rows: {skip}")


def _lines(stream: IO[bytes], where: str, digits: int) -> Iterator[KeyedValue | Reject]:
    for line in read_lines(stream):
        key = f"{where}/{line.number - 1:0{digits}d}"
        try:
            yield key, parse_line(line)
        except Skip as skip:
            if skip.reason == "cut_shard":
                yield Reject(where, "cut_shard", f"{where} ends within line {line.number}")
            else:
                yield Reject(key, skip.reason, f"line {line.number}: {skip}")


def _table(shard: str, name: str, digits: int) -> Iterator[KeyedValue | Reject]:
    number = 0
    try:
        with tables.open_table(shard) as table:
            for batch in table.batches(TABLE_ROWS):
                for row in tables.rows_of(batch):
                    key = f"{name}/{number:0{digits}d}"
                    yield row.reject(key) if isinstance(row, Skip) else (key, row)
                    number += 1
    except Skip as skip:
        yield Reject(name, skip.reason, f"{name} breaks off after {number} rows: {skip}")
