"""Streams by gzip and Zstandard: several frames, every cut told, bounded memory, and the readers that unpack them."""

import gzip
import io
import json
import resource
import subprocess
import sys
import tarfile

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from emu_jax.data.raw.compressed import CutError, unpacked
from emu_jax.data.raw.limits import by_file
from emu_jax.data.raw.reader import RawDocument, Reject
from emu_jax.data.raw.readers import make_reader
from emu_jax.data.raw.rows import read_rows

SKIPPED = b"\x5a\x2a\x4d\x18\x03\0\0\0abc"  # a frame without data


def _zst(data: bytes, level: int = 3, checksum: bool = False, size: bool = True) -> bytes:
    unsized = zstandard.ZstdCompressor(level=level, write_checksum=checksum, write_content_size=size)
    return unsized.compress(data)


def _gz(data: bytes, *_) -> bytes:
    return gzip.compress(data)


def _read(data: bytes, suffix: str = "") -> tuple[bytes, bool]:
    """What can be unpacked, and whether the stream was cut."""
    stream, found = unpacked(io.BufferedReader(io.BytesIO(data)), suffix), b""
    try:
        while part := stream.read1(5_000):
            found += part
    except CutError:
        return found, True
    return found, False


TEXTS = st.binary(max_size=40) | st.integers(0, 300_000).map(lambda n: b"x" * n)
FRAMES = st.lists(st.tuples(TEXTS, st.integers(1, 5), st.booleans(), st.booleans()), min_size=1, max_size=4)


@given(frames=FRAMES, pack=st.sampled_from([_zst, _gz]), cut=st.integers(1, 60), skipped=st.booleans())
def test_frames_are_joined_and_cuts_told(frames, pack, cut, skipped):
    packed = [pack(*frame) for frame in frames]
    if skipped and pack is _zst:
        packed.insert(0, SKIPPED)
        frames = [(b"",), *frames]
    whole = b"".join(data for data, *_ in frames)
    assert _read(b"".join(packed)) == (whole, False)
    ends = {sum(map(len, packed[:n])): b"".join(data for data, *_ in frames[:n]) for n in range(len(packed) + 1)}
    length = max(4, len(b"".join(packed)) - cut)  # fewer bytes are of no known kind
    found, was_cut = _read(b"".join(packed)[:length], ".zst" if pack is _zst else ".gz")
    assert whole.startswith(found)
    assert was_cut == (length not in ends)
    if not was_cut:
        assert found == ends[length]


def test_every_cut_of_a_frame_of_several_blocks_is_told():
    data = bytes(range(256)) * 1200  # three blocks
    for packed in (_zst(data, 1, True), _zst(data, 1, False, False)):
        for length in [*range(1, 60), *range(len(packed) - 60, len(packed))]:
            found, was_cut = _read(packed[:length], ".zst")
            assert was_cut and data.startswith(found)


@pytest.mark.parametrize("suffix", [".zst", ".gz"])
@pytest.mark.parametrize("data", [b"x", b"plain text", b"\x28\xb5\x2f\xfd\xff\xff\xff\xff\xff\xff"])
def test_other_bytes_are_told(suffix, data):
    assert _read(data, suffix) == (b"", True)


def test_what_is_not_packed_is_read_as_it_is():
    assert _read(b"plain") == (b"plain", False)
    assert _read(b"", ".zst") == (b"", True), "no frame"


BOMB = """
import io, resource, sys
from emu_jax.data.raw.compressed import unpacked
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
stream, size = unpacked(io.BufferedReader(open(sys.argv[1], "rb"))), 0
before = peak()
while part := stream.read(1 << 16):
    size += len(part)
print(size, (peak() - before) // 1024)
"""


def test_bombs_take_time_and_no_memory(tmp_path):
    """A gigabyte of zeros in 33 kB; the window of a frame is at most 128 MB."""
    packer = zstandard.ZstdCompressor(level=1).compressobj()
    data = b"".join(packer.compress(bytes(1 << 20)) for _ in range(1 << 10)) + packer.flush()
    (tmp_path / "bomb").write_bytes(data)
    out = subprocess.run([sys.executable, "-c", BOMB, tmp_path / "bomb"], capture_output=True, text=True, check=True)
    size, megabytes = map(int, out.stdout.split())
    assert len(data) < 50_000 and size == 1 << 30 and megabytes < 30, out.stdout
    wide = zstandard.ZstdCompressionParameters(window_log=28, enable_ldm=True)
    packer = zstandard.ZstdCompressor(compression_params=wide).compressobj()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert _read(packer.compress(b"a") + packer.flush()) == (b"", True)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10, "kB; the window is 256 MB"


# ---------------------------------------------------------------- the readers


def _documents(reader, path):
    found = [item for shard in reader.shards(str(path)) for item in reader.read(shard)]
    return [f.parts for f in found if isinstance(f, RawDocument)], [f for f in found if isinstance(f, Reject)]


@pytest.mark.parametrize(("suffix", "pack"), [("", bytes), (".zst", _zst), (".gz", gzip.compress)])
@pytest.mark.parametrize("kind", ["jsonl", "ndjson", "json"])
def test_rows(tmp_path, kind, suffix, pack):
    rows = [{"n": n} for n in range(5)]
    text = json.dumps(rows) if kind == "json" else "".join(f"{json.dumps(row)}\n" for row in rows)
    half = len(text) // 2
    data = pack(text[:half].encode()) + pack(text[half:].encode())  # two frames
    path = tmp_path / f"a.{kind}{suffix}"
    path.write_bytes(data)
    assert list(read_rows(str(path))) == [(f"{path.name}/{row['n']}", row) for row in rows]
    path.write_bytes(data[:-3])
    *found, last = read_rows(str(path))
    assert (last.key, last.reason) == (path.name, "cut_shard")
    assert [row for _, row in found] == rows[: len(found)]


@pytest.mark.parametrize("suffix", ["", ".zst", ".gz"])
def test_chats(tmp_path, suffix):
    chat = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    for kind, text in (("json", json.dumps([chat])), ("ndjson", json.dumps(chat) + "\n")):
        data = text.encode()
        packed = {"": data, ".zst": _zst(data), ".gz": gzip.compress(data)}[suffix]
        (tmp_path / f"{kind}.{kind}{suffix}").write_bytes(packed)
    documents, rejects = _documents(make_reader("chats"), tmp_path)
    assert len(documents) == 2 and not rejects


@pytest.mark.parametrize(("suffix", "pack"), [("tar.zst", _zst), ("tzst", _zst), ("tar.gz", gzip.compress)])
def test_tars_of_pairs(tmp_path, suffix, pack):
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w") as archive:
        for name, data in (("a.jpg", b"A"), ("a.txt", b"text a"), ("b.jpg", b"B"), ("b.txt", b"text b")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    data = plain.getvalue()
    path = tmp_path / f"0.{suffix}"
    path.write_bytes(pack(data[:700]) + pack(data[700:]))
    (tmp_path / "0_stats.json").write_text('{"successes": 3}')
    documents, (reject,) = _documents(make_reader("pairs"), tmp_path)
    assert [parts[1].text for parts in documents] == ["text a", "text b"] and reject.reason == "count_differs"
    path.write_bytes((pack(data[:700]) + pack(data[700:]))[:-4])
    *_, reject = make_reader("pairs").read(str(path))
    assert (reject.reason, reject.key) == ("cut_shard", path.name)
    (tmp_path / "0.tar").write_bytes(data)
    if suffix.startswith("tar"):
        assert by_file(make_reader("pairs").shards(str(tmp_path))) == [(f"{tmp_path}//0.tar",)], "read once"
