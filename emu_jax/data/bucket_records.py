"""Random access to an ArrayRecord file in a bucket, by requests for the bytes of the wanted records alone.

ArrayRecord's reader opens local files only; given `gs://…` it neither reads nor raises. Copies of whole files would not
help: a shuffled pass takes records from all files in turn, and a bounded cache loses a file before its next record is
wanted. So a file is opened by one request for its end, which states where each record is; then each run of neighbours
is one request. The bytes go to the same place of a sparse local file of the same size, from which ArrayRecord's own
reader takes the records and checks their hashes.

    bucket    | record 0 | record 1 | record 2 | record 3 | footer: the offset of every record | postscript |
    local     |   hole   | record 1 |   hole   |   hole   | footer                             | postscript |
"""

from __future__ import annotations

import itertools
import os
import struct
import tempfile
import weakref
from collections.abc import Iterator, Sequence

import zstandard
from array_record.python.array_record_module import ArrayRecordReader
from etils import epath

from emu_jax.buckets import filesystem

TAIL = 1 << 18  # bytes of the first request: the end of a file of 256 MB has about 100 kB
# Riegeli's format (records_file_format.md in google/riegeli): the file is in blocks, which begin by a header of their
# own even within a chunk; a chunk of ours holds one record, the footer is a chunk of one record a chunk, and the last
# block is a chunk that states where the footer begins (cpp/layout.proto in google/array_record).
BLOCK, BLOCK_HEADER, CHUNK_HEADER = 1 << 16, 24, 40
PLAIN, ZSTD = 0, ord("z")  # compression


class BucketReader:
    """Reads the records of one file; any number of threads may use it at once.

    Args:
      size: the file's size in bytes.
      options: those of the local reader.

    Raises:
      ValueError: the file has another size, or is no ArrayRecord file with a chunk for each record.
    """

    def __init__(self, path: epath.Path, size: int, options: dict[str, str | int]):
        self._path, self._filesystem = str(path), filesystem(path)
        start = max(0, size - TAIL)
        tail = self._fetch([(start, size)])[0]
        if len(tail) != size - start:
            raise ValueError(f"fewer bytes than {size:,}")
        footer = _first_field(next(_records(_chunk(tail[-BLOCK:], 0))))
        if not 0 <= footer <= size - BLOCK:
            raise ValueError("no footer")
        if footer < start:
            tail = self._fetch([(footer, start)])[0] + tail
            start = footer
        self._offsets = [*_offsets(_chunk(tail[footer - start : -BLOCK], footer)), footer]
        self._file, name = tempfile.mkstemp(prefix="emu-jax-")
        weakref.finalize(self, os.close, self._file)
        try:
            os.truncate(self._file, size)
            os.pwrite(self._file, tail[footer - start :], footer)
            self._reader = ArrayRecordReader(name, **options)
        finally:
            os.unlink(name)  # the two handles keep it

    def num_records(self) -> int:
        return len(self._offsets) - 1

    def ok(self) -> bool:
        return self._reader.ok()

    def read(self, positions: Sequence[int]) -> list[bytes]:
        """The records at `positions`.

        Raises:
          RuntimeError, IndexError: a record is damaged, or there is no such record.
        """
        ranges = list(self._ranges(positions))
        for (start, _), data in zip(ranges, self._fetch(ranges), strict=True):
            os.pwrite(self._file, data, start)
        return self._reader.read(positions)

    def _ranges(self, positions: Sequence[int]) -> Iterator[tuple[int, int]]:
        """(start, stop) in bytes of each run of neighbours."""
        numbered = enumerate(sorted(set(positions)))
        for _, run in itertools.groupby(numbered, lambda place: place[1] - place[0]):
            found = [position for _, position in run]
            yield self._offsets[found[0]], self._offsets[found[-1] + 1]

    def _fetch(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        starts, stops = [start for start, _ in ranges], [stop for _, stop in ranges]
        return self._filesystem.cat_ranges([self._path] * len(ranges), starts, stops, on_error="raise")


def _offsets(chunk: bytes) -> list[int]:
    """The position of every record's chunk, from the footer's chunk."""
    _, *footers = _records(chunk)
    return [_first_field(footer) for footer in footers]


def _chunk(data: bytes, start: int) -> bytes:
    """The body of the chunk at the beginning of `data`, which is at `start` in its file."""
    pieces, position = [], 0
    while position < len(data):
        if (start + position) % BLOCK == 0:
            position += BLOCK_HEADER
        stop = position + BLOCK - (start + position) % BLOCK
        pieces.append(data[position:stop])
        position = stop
    whole = b"".join(pieces)
    if len(whole) < CHUNK_HEADER:
        raise ValueError("no chunk")
    (size,) = struct.unpack("<8xQ24x", whole[:CHUNK_HEADER])
    return whole[CHUNK_HEADER : CHUNK_HEADER + size]


def _records(body: bytes) -> Iterator[bytes]:
    """The records of a simple chunk: the compression, the length of the sizes, the sizes, the values."""
    if not body or body[0] not in (PLAIN, ZSTD):
        raise ValueError("its compression is neither zstd nor none")
    length, start = _varint(body, 1)
    sizes = _decompressed(body[0], body[start : start + length])
    values = _decompressed(body[0], body[start + length :])
    at = first = 0
    while at < len(sizes):
        size, at = _varint(sizes, at)
        yield values[first : first + size]
        first += size


def _decompressed(compression: int, data: bytes) -> bytes:
    if compression == PLAIN:
        return data
    size, start = _varint(data, 0)
    try:
        return zstandard.ZstdDecompressor().decompress(data[start:], max_output_size=size)
    except zstandard.ZstdError as error:
        raise ValueError(str(error)) from error


def _first_field(message: bytes) -> int:
    """Field 1 of a protocol buffer, an unsigned integer: where the footer, or a chunk, begins."""
    if message[:1] != b"\x08":
        raise ValueError("no position")
    return _varint(message, 1)[0]


def _varint(data: bytes, start: int) -> tuple[int, int]:
    """A number of variable length, and where it ends."""
    number = shift = 0
    for at in range(start, min(start + 10, len(data))):
        number |= (data[at] & 127) << shift
        shift += 7
        if data[at] < 128:
            return number, at + 1
    raise ValueError("a number is cut off")
