"""How large the frames are that an AVIF file makes a decoder decode, whatever size the file states.

    file ─ boxes ─┬─ meta / iloc: where the items are stored ────────┬─ OBUs ─ sequence headers ─ (width, height)
                  └─ moov / … / stbl: the first sample of each track ┘

A file of 3 kB may state 64 x 64 pixels and hold a frame of 16,000 x 12,000, which libavif decodes before it compares.
Boxes are of ISO/IEC 14496-12, sequence headers of section 5.5 of the AV1 bitstream specification.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

SEQUENCE_HEADER = 1  # type of an OBU
TRACK = (b"moov", b"trak", b"mdia", b"minf", b"stbl")


def coded_sizes(data: bytes) -> list[tuple[int, int]]:
    """Width and height of each AV1 sequence among the items, and in the first sample of each track.

    Raises:
      ValueError: items overlap so much that reading them would take very long.
    """
    return [size for stored in _stored(data) for size in _sequences(stored)]


def _number(data: bytes, start: int, size: int) -> int:
    return int.from_bytes(data[start : start + size], "big")


def _boxes(data: bytes, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Name, start and end of the contents of each box."""
    while start + 8 <= end:
        size, begin = _number(data, start, 4), start + 8
        if size == 1:
            size, begin = _number(data, start + 8, 8), start + 16
        stop = min(start + size, end) if size else end
        if stop < begin:
            return
        yield data[start + 4 : start + 8], begin, stop
        start = stop


def _stored(data: bytes) -> Iterator[bytes]:
    """The contents of each item, and the first sample of each track."""
    for name, start, end in _boxes(data, 0, len(data)):
        if name == b"meta":
            yield from _items(data, start + 4, end)
        elif name == b"moov":
            for first, last in _inside(data, start, end, TRACK[1:]):
                yield from _first_sample(data, dict(_named(data, first, last)))


def _named(data: bytes, start: int, end: int) -> Iterator[tuple[bytes, tuple[int, int]]]:
    for name, first, last in _boxes(data, start, end):
        yield name, (first, last)


def _inside(data: bytes, start: int, end: int, path: tuple[bytes, ...]) -> Iterator[tuple[int, int]]:
    if not path:
        yield start, end
        return
    for name, first, last in _boxes(data, start, end):
        if name == path[0]:
            yield from _inside(data, first, last, path[1:])


def _first_sample(data: bytes, boxes: dict[bytes, tuple[int, int]]) -> Iterator[bytes]:
    if b"stsz" in boxes and (b"stco" in boxes or b"co64" in boxes):
        wide = b"co64" in boxes
        sizes, offsets = boxes[b"stsz"][0], boxes[b"co64" if wide else b"stco"][0]
        size = _number(data, sizes + 4, 4) or _number(data, sizes + 12, 4)
        offset = _number(data, offsets + 8, 8 if wide else 4)
        yield data[offset : offset + size]


def _items(data: bytes, start: int, end: int) -> Iterator[bytes]:
    boxes = dict(_named(data, start, end))
    if b"iloc" not in boxes:
        return
    inside = boxes.get(b"idat", (0, 0))
    at, stop = boxes[b"iloc"]
    version, sizes = data[at], _number(data, at + 4, 2)
    offset_size, length_size, base_size, index_size = (sizes >> shift & 15 for shift in (12, 8, 4, 0))
    wide = 4 if version == 2 else 2
    at += 6
    count, at = _number(data, at, wide), at + wide
    total = 0
    for _ in range(count):
        if at >= stop:
            return
        at += wide
        method = _number(data, at, 2) & 15 if version else 0
        at += (2 if version else 0) + 2
        base, at = _number(data, at, base_size), at + base_size
        extents, at = _number(data, at, 2), at + 2
        parts = []
        for _ in range(extents):
            if at >= stop:
                return
            at += index_size if version else 0
            offset, length = base + _number(data, at, offset_size), _number(data, at + offset_size, length_size)
            at += offset_size + length_size
            offset += inside[0] if method == 1 else 0
            parts.append(data[offset : offset + length] if length else data[offset:])
            total += len(parts[-1])
            if total > 4 * len(data):
                raise ValueError("items overlap")
        yield b"".join(parts)


def _sequences(stored: bytes) -> Iterator[tuple[int, int]]:
    at = 0
    while at < len(stored):
        header = stored[at]
        at += 2 if header & 4 else 1
        size, shift = len(stored) - at, 0
        if header & 2:  # the size follows, 7 bits a byte
            size = 0
            while shift < 56 and at < len(stored):
                size |= (stored[at] & 127) << shift
                shift, at = shift + 7, at + 1
                if stored[at - 1] < 128:
                    break
        if header >> 3 & 15 == SEQUENCE_HEADER:
            yield _sequence_size(_Bits(stored[at : at + min(size, 1024)]))
        at += size


@dataclasses.dataclass
class _Bits:
    """Reads bits from the highest on; behind the end they are 0."""

    data: bytes
    at: int = 0

    def __call__(self, count: int) -> int:
        first, last = self.at // 8, (self.at + count + 7) // 8
        piece = self.data[first:last].ljust(last - first, b"\0")
        value = int.from_bytes(piece, "big") >> (8 * last - self.at - count)
        self.at += count
        return value & ((1 << count) - 1)


def _sequence_size(bits: _Bits) -> tuple[int, int]:
    bits(4)  # profile, still
    if bits(1):  # a reduced header
        bits(5)
    else:
        delays = 0  # bits of a delay of the decoder model; 0 where there is none
        if bits(1):  # timing
            bits(64)
            if bits(1):
                zeros = 0
                while not bits(1) and zeros < 32:
                    zeros += 1
                bits(zeros)
            if bits(1):
                delays = bits(5) + 1
                bits(42)
        displays = bits(1)
        for _ in range(bits(5) + 1):  # operating points
            bits(12)
            if bits(5) > 7:
                bits(1)
            if delays and bits(1):
                bits(2 * delays + 1)
            if displays and bits(1):
                bits(4)
    width_bits, height_bits = bits(4) + 1, bits(4) + 1
    return bits(width_bits) + 1, bits(height_bits) + 1
