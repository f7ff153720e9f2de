"""Whole images that cost their decoder time or memory: small files, and within the 50 megapixels that are allowed."""

from __future__ import annotations

import io
import struct
import zlib

from PIL import Image


def slow_jpeg(side: int = 7000, scans: int = 50_000) -> bytes:
    """A progressive JPEG of one grey, whose last scan is repeated: a decoder walks over all blocks for each scan.

    A scan has some 75 bytes, for its blocks are a few long runs, and takes a core tens of milliseconds.
    """
    file = io.BytesIO()
    Image.new("L", (side, side), 90).save(file, "JPEG", progressive=True)
    data = file.getvalue()
    last = data.rindex(b"\xff\xda")  # start of a scan
    return data[:-2] + data[last:-2] * scans + data[-2:]


def large_png(width: int, height: int, *, alpha: bool = False) -> bytes:
    """A whole PNG of one colour: at 13,000 x 13,000 some 500 KB that would decode to half a gigabyte."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer, row = zlib.compressobj(1), bytes(1 + (4 if alpha else 3) * width)
    rows = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 6 if alpha else 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
