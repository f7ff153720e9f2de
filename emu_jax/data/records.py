"""Records of an ArrayRecord file: a JSON header and the bytes of one encoded image.

4 bytes little-endian length of the header | header, UTF-8 JSON | image as PNG, JPEG or WebP
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from array_record.python.array_record_module import ArrayRecordWriter

from emu_jax.errors import UserError


def pack_record(header: dict[str, Any], image: bytes) -> bytes:
    """Header and encoded image -> one record."""
    text = json.dumps(header, ensure_ascii=False, sort_keys=True).encode()
    return struct.pack("<I", len(text)) + text + image


def unpack_record(record: bytes, where: str) -> tuple[dict[str, Any], bytes]:
    """The inverse of `pack_record`; `where` names the record in errors."""
    if len(record) >= 4:
        (length,) = struct.unpack_from("<I", record)
        try:
            return json.loads(record[4 : 4 + length]), record[4 + length :]
        except ValueError:
            pass
    raise UserError(
        f"{where}: not an emu_jax record; expected a JSON header and an image (see emu_jax/data/records.py)"
    )


def write_records(path: Path, records: Iterable[bytes]) -> int:
    """Writes an ArrayRecord file that appears whole or not at all; returns the number of records."""
    partial = path.with_suffix(path.suffix + ".partial")
    # group_size:1 makes every record its own compression block: random access reads no neighbours.
    writer = ArrayRecordWriter(str(partial), "group_size:1")
    count = 0
    for record in records:
        writer.write(record)
        count += 1
    writer.close()
    partial.replace(path)
    return count
