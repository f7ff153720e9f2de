"""Rows of JSON lines, JSON arrays and Parquet, one at a time.

    docs_0.jsonl, .jsonl.gz, .jsonl.zip, .json, .parquet ─ read_rows ─ ("docs_0.jsonl/17", {…}) | Reject

The number in a key counts lines or rows, from 0.
"""

from __future__ import annotations

import gzip
import io
import zipfile
import zlib
from collections.abc import Iterator
from typing import IO, Any

from emu_jax.data.raw.files import Skip, json_array, opened, parse_line, shard_name
from emu_jax.data.raw.reader import Reject
from emu_jax.errors import TransientError, UserError, shown
from emu_jax.storage import read_lines

PATTERNS = ("*.jsonl", "*.jsonl.gz", "*.jsonl.zip", "*.json", "*.json.gz", "*.parquet")
PARQUET_ROWS = 16  # in memory at once; a row may hold its images
PACKED = (".gz", ".zip")

KeyedRow = tuple[str, dict[str, Any]]  # key, object


def without_twins(shards: list[str]) -> list[str]:
    """Leaves out compressed files that are also there uncompressed: their documents would be read twice."""
    names = set(shards)
    return [shard for shard in shards if not any(shard.removesuffix(end) in names - {shard} for end in PACKED)]


def read_rows(shard: str) -> Iterator[KeyedRow | Reject]:
    """The objects of a shard in order, each with its key.

    Raises:
      UserError: the file is gone, or pyarrow is missing.
    """
    name = shard_name(shard)
    try:
        if name.endswith(".parquet"):
            yield from _parquet(shard, name)
        elif name.endswith(".zip"):
            with opened(shard) as file, zipfile.ZipFile(file) as archive:
                members = [member for member in archive.namelist() if member.endswith((".jsonl", ".json"))]
                for member in members:
                    # Published archives hold one file of the same name; in others, the member's name tells them apart.
                    where = name if len(members) == 1 else f"{name}/{member}"
                    with archive.open(member) as stream:
                        yield from _json(stream, where, member)
        elif name.endswith(".gz"):
            with opened(shard) as file, gzip.open(file) as stream:
                yield from _json(stream, name, name.removesuffix(".gz"))
        else:
            with opened(shard) as stream:
                yield from _json(stream, name, name)
    except TransientError:
        raise
    except (zipfile.BadZipFile, EOFError, zlib.error, gzip.BadGzipFile, NotImplementedError, RuntimeError) as error:
        yield Reject(name, "cut_shard", f"{name} cannot be unpacked further ({error})")
    except FileNotFoundError as error:
        raise UserError(f"{shard}: no such file; it was there when the shards were listed") from error
    except OSError as error:
        yield Reject(name, "cut_shard", f"{name} cannot be read further ({error.strerror or error})")


def _json(stream: IO[bytes] | gzip.GzipFile, where: str, name: str) -> Iterator[KeyedRow | Reject]:
    if name.endswith(".jsonl"):
        yield from _lines(stream, where)
        return
    text = io.TextIOWrapper(stream, encoding="utf-8", errors="surrogateescape")
    number = 0
    try:
        for value in json_array(text):
            yield _row(f"{where}/{number}", value)
            number += 1
    except Skip as skip:
        yield Reject(where, skip.reason, f"{where} cannot be read after {number} rows: {skip}")


def _lines(stream: IO[bytes] | gzip.GzipFile, where: str) -> Iterator[KeyedRow | Reject]:
    for line in read_lines(stream):
        key = f"{where}/{line.number - 1}"
        try:
            yield _row(key, parse_line(line))
        except Skip as skip:
            if skip.reason == "cut_shard":
                yield Reject(where, "cut_shard", f"{where} ends within line {line.number}")
            else:
                yield Reject(key, skip.reason, f"line {line.number}: {skip}")


def _row(key: str, value: Any) -> KeyedRow | Reject:
    if isinstance(value, dict):
        return key, value
    return Reject(key, "unreadable_record", f"expected an object, found {shown(value)}")


def _parquet(shard: str, name: str) -> Iterator[KeyedRow | Reject]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"{shard}: Parquet needs pyarrow; run `pip install 'emu-jax[prepare]'`") from error
    number = 0
    try:
        with opened(shard) as data, pyarrow.parquet.ParquetFile(data) as file:
            for batch in file.iter_batches(batch_size=PARQUET_ROWS):
                for row in batch.to_pylist():
                    yield f"{name}/{number}", row
                    number += 1
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        detail = str(error).splitlines()[0] if str(error) else type(error).__name__
        yield Reject(name, "cut_shard", f"{name} breaks off after {number} rows: {detail}")
