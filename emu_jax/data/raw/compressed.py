"""Streams compressed by gzip or Zstandard, unpacked as they are read; a stream that is cut says so.

    a.jsonl.zst ─ Zstd ─┬─ zstandard ─ bytes
                        └─ _Framing: does the stream end where a frame does?

Memory is bounded by the window that a frame states, at most `MAX_WINDOW`, however far the data expand.
"""

from __future__ import annotations

import gzip
import io
import zlib
from typing import IO, Any

from emu_jax.errors import UserError

GZIP, ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"  # the first bytes of a stream
SKIPPABLE = 0x184D2A50  # to …5F: a frame without data, such as an index; in other streams only after a frame
MAX_WINDOW = 128 << 20
BUFFER = 1 << 17
SUFFIXES = (".gz", ".zst")


class CutError(Exception):
    """A compressed stream that cannot be unpacked further."""


def unpacked(stream: io.BufferedReader, suffix: str = "") -> IO[bytes]:
    """The unpacked bytes of a stream, which raise CutError where they end too soon.

    Args:
      suffix: ".gz" or ".zst" where the stream has to be of that kind; "": its first bytes tell, and others are not
        unpacked.

    Raises:
      UserError: the package zstandard is missing.
    """
    head = stream.peek(4)[:4]
    if suffix == ".gz" or (not suffix and head.startswith(GZIP)):
        return io.BufferedReader(_Gzip(stream), BUFFER)
    if suffix == ".zst" or (not suffix and (head == ZSTD or _is_skippable(head))):
        return io.BufferedReader(_Zstd(stream), BUFFER)
    return stream


class _Unpacked(io.RawIOBase):
    def readable(self) -> bool:
        return True


class _Gzip(_Unpacked):
    def __init__(self, stream: IO[bytes]):
        self._file = gzip.GzipFile(fileobj=stream)

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._file.read1(len(buffer))  # `read` would lose what it has read before a cut
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise CutError(str(error)) from error
        buffer[: len(data)] = data
        return len(data)


class _Zstd(_Unpacked):
    def __init__(self, stream: IO[bytes]):
        try:
            import zstandard
        except ImportError as error:
            name = getattr(stream, "name", "a .zst file")
            raise UserError(f"{name}: needs zstandard ({error}); run `pip install 'emu-jax[prepare]'`") from error
        self._error = zstandard.ZstdError
        self._framing = _Framing(stream)
        unpacker = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW)
        source: Any = self._framing  # of a file, only `read` is used
        self._reader = unpacker.stream_reader(source, read_across_frames=True, closefd=False)

    def readinto(self, buffer: Any) -> int:
        try:
            size = self._reader.readinto1(buffer)
        except self._error as error:
            raise CutError(f"Zstandard: {error}") from error
        if not size and not self._framing.ended:
            raise CutError("Zstandard: the stream ends within a frame")
        return size


class _Framing:
    """A stream of Zstandard frames that knows whether what was read of it ends where a frame does.

    The unpacker does not say so: it takes the end of a stream for the end of a frame. The layout is RFC 8878's.
    """

    def __init__(self, stream: IO[bytes]):
        self._stream = stream
        self._expected, self._head = "magic", b""  # the next field, and what was read of it
        self._left = 0  # bytes before it
        self._checksum = 0
        self._frames = 0

    @property
    def ended(self) -> bool:
        return self._frames > 0 and self._expected == "magic" and not self._head and not self._left

    def read(self, size: int) -> bytes:
        data = self._stream.read(size)
        position = 0
        while position < len(data):
            if self._left:
                step = min(self._left, len(data) - position)
                self._left -= step
            else:
                step = min(FIELDS[self._expected] - len(self._head), len(data) - position)
                self._head += data[position : position + step]
                if len(self._head) == FIELDS[self._expected]:
                    self._follow(int.from_bytes(self._head, "little"))
                    self._head = b""
            position += step
        return data

    def _follow(self, value: int) -> None:
        """Decides by a field what comes next."""
        if self._expected == "magic":
            self._frames += 1
            self._expected = "size" if SKIPPABLE <= value < SKIPPABLE + 16 else "descriptor"
        elif self._expected == "size":
            self._left, self._expected = value, "magic"
        elif self._expected == "descriptor":
            single = value >> 5 & 1  # segment, which states no window
            content = (single, 2, 4, 8)[value >> 6]
            self._left = (1 - single) + (0, 1, 2, 4)[value & 3] + content
            self._checksum = 4 * (value >> 2 & 1)
            self._expected = "block"
        else:
            repeated = (value >> 1 & 3) == 1  # one byte for the whole block
            last = value & 1
            self._left = (1 if repeated else value >> 3) + self._checksum * last
            self._expected = "magic" if last else "block"


FIELDS = {"magic": 4, "size": 4, "descriptor": 1, "block": 3}  # bytes of each


def _is_skippable(head: bytes) -> bool:
    return len(head) == 4 and SKIPPABLE <= int.from_bytes(head, "little") < SKIPPABLE + 16
