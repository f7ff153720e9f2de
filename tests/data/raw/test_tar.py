"""Tars of samples: what is read, what is left out, and that every cut is told."""

import io
import pickle
import random
import subprocess
import tarfile
import unicodedata
from pathlib import Path

import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st

from emu_jax.data.raw.reader import Reject
from emu_jax.data.raw.tar import Sample, read_samples
from emu_jax.errors import UserError


def _archive(path: Path, members, tar_format: int = tarfile.PAX_FORMAT) -> Path:
    """Members are (name, bytes) or TarInfo."""
    with tarfile.open(path, "w", format=tar_format) as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member, io.BytesIO(b"x" * member.size))
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                archive.addfile(info, io.BytesIO(member[1]))
    return path


def _webdataset(path: Path, samples: int, seed: int = 0) -> list[Sample]:
    """A tar as img2dataset writes it: images of random length."""
    rng = random.Random(seed)
    written = []
    with webdataset.TarWriter(str(path)) as writer:
        for n in range(samples):
            members = {"jpg": rng.randbytes(rng.randrange(1, 3000)), "txt": f"text {n}".encode(), "json": b"{}"}
            writer.write({"__key__": f"{n:09d}", **members})
            written.append(Sample(f"{n:09d}", members))
    return written


def _read(path: Path, **settings):
    """The samples, and the rejects."""
    found = list(read_samples(str(path), **settings))
    return [f for f in found if isinstance(f, Sample)], [f for f in found if isinstance(f, Reject)]


# ---------------------------------------------------------------- what is read


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz"])
def test_what_webdataset_writes(tmp_path, name):
    written = _webdataset(tmp_path / name, 20)
    assert _read(tmp_path / name) == (written, [])


NAMES = st.text("abcé☃ _-", min_size=1, max_size=150).map(lambda text: f"n{text}")


@given(
    st.dictionaries(NAMES, st.dictionaries(st.sampled_from(["jpg", "txt", "seg.png"]), st.binary(max_size=1200))),
    st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]),
)
def test_any_names_in_any_format(tmp_path_factory, samples, tar_format):
    path = tmp_path_factory.getbasetemp() / "any.tar"
    _archive(path, [(f"f/{n}.{e}", data) for n, members in samples.items() for e, data in members.items()], tar_format)
    expected = [Sample(f"f/{n}", members) for n, members in samples.items() if members]
    assert _read(path) == (expected, [])


ANY = st.text(st.characters(codec="utf-8", exclude_characters="\0/"), min_size=1, max_size=12)


@given(st.lists(ANY, max_size=4, unique=True), st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]))
def test_a_name_may_hold_any_character(tmp_path_factory, names, tar_format):
    """Only what would break or reorder a line is escaped in keys; no name but .. is unsafe."""
    path = tmp_path_factory.getbasetemp() / "names.tar"
    names = [f"n{name.strip('.')}" for name in names]
    names = [name for name in dict.fromkeys(names) if "." not in name]
    _archive(path, [(f"{name}.jpg", b"1") for name in names], tar_format)
    samples, rejects = _read(path)
    assert not rejects
    for sample, name in zip(samples, names, strict=True):
        assert sample.members == {"jpg": b"1"} and len(sample.name.splitlines()) == 1
        steering = any(unicodedata.category(c)[0] in "CZ" for c in name)
        assert sample.name == name or steering


@pytest.mark.parametrize("name", ["猫\u30001", "Screenshot 9.41\u202fAM", "astronaut 👩\u200d🚀", "caf\u00e9"])
def test_names_of_japanese_and_of_screenshots(tmp_path, name):
    samples, rejects = _read(_archive(tmp_path / "t.tar", [(f"{name}.png", b"1"), (f"{name}.txt", b"2")]))
    assert (samples, rejects) == ([Sample(name, {"png": b"1", "txt": b"2"})], [])


def test_groups_end_where_the_name_changes(tmp_path):
    names = [
        "./d/a.JPG",
        "d/a.seg.png",
        "d/a.txt",
        "e.x/a.txt",
        "README",
        ".hidden.txt",
        "__meta__.txt",
        "b.txt",
        "e.x/a.jpg",
    ]
    samples, rejects = _read(_archive(tmp_path / "t.tar", [(name, name.encode()) for name in names]))
    assert samples == [
        Sample("d/a", {"jpg": b"./d/a.JPG", "seg.png": b"d/a.seg.png", "txt": b"d/a.txt"}),
        Sample("e.x/a", {"txt": b"e.x/a.txt"}),  # the dot of a folder is none of the name's
        Sample("b", {"txt": b"b.txt"}),
    ]
    assert [(r.key, r.reason, r.whole) for r in rejects] == [("t.tar/e.x/a", "repeated_key", True)]


def test_sizes_are_bounded(tmp_path):
    path = _archive(
        tmp_path / "t.tar", [("a.txt", b"a" * 5000), ("b.x", b"b" * 3000), ("b.y", b"c" * 2000), ("b.y", b"")]
    )
    samples, rejects = _read(path, max_member_bytes=4096)
    assert samples == [Sample("b", {"x": b"b" * 3000})]
    assert [(r.key, r.reason, r.whole) for r in rejects] == [
        ("t.tar/a.txt", "member_too_large", False),
        ("t.tar/b.y", "member_too_large", False),  # together with b.x
        ("t.tar/b.y", "member_too_large", False),
    ]


def test_no_such_archive(tmp_path):
    with pytest.raises(UserError, match="cannot be opened"):
        list(read_samples(str(tmp_path / "none.tar")))


# ---------------------------------------------------------------- what is not trusted


def _special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


class _Bomb:
    """Unpickling makes a file."""

    def __init__(self, path: Path):
        self._path = path

    def __reduce__(self):
        return open, (str(self._path), "w")


def test_hostile_members_are_left_out_and_write_nothing(tmp_path, monkeypatch):
    inside = tmp_path / "inside"
    inside.mkdir()
    monkeypatch.chdir(inside)
    outside = tmp_path / "outside.txt"
    members = [
        ("a.txt", b"good"),
        ("../outside.txt", b"evil"),
        (str(outside), b"evil"),
        ("b/../../outside.txt", b"evil"),
        _special("link.jpg", tarfile.SYMTYPE, "/etc/passwd"),
        _special("hard.jpg", tarfile.LNKTYPE, "../outside.txt"),
        _special("pipe.jpg", tarfile.FIFOTYPE),
        _special("zero.jpg", tarfile.CHRTYPE),
        _special("disk.jpg", tarfile.BLKTYPE),
        _special("folder", tarfile.DIRTYPE),
        _special("../folder", tarfile.DIRTYPE),
        _special("odd.jpg", b"Q"),
        (f"{'n' * 5000}.txt", b"evil"),
        ("p.pkl", pickle.dumps(_Bomb(outside))),
        ("p.meta.pyd", pickle.dumps(_Bomb(outside))),
        ("p.pickle", pickle.dumps(_Bomb(outside))),
        ("z.txt", b"good too"),
    ]
    path = _archive(tmp_path / "t.tar", members)
    before = sorted(tmp_path.rglob("*"))
    samples, rejects = _read(path)
    assert samples == [Sample("a", {"txt": b"good"}), Sample("z", {"txt": b"good too"})]
    reasons = ["unsafe_member"] * 3 + ["unread_member"] * 5 + ["unsafe_member"] + ["unread_member"] * 2
    assert [(r.reason, r.whole) for r in rejects] == [(r, False) for r in (*reasons, *["pickle_member"] * 3)]
    for reject in rejects:
        print(f"{reject.key}: {reject.detail}")
        assert reject.key.startswith("t.tar/") and reject.key.isprintable()
    assert sorted(tmp_path.rglob("*")) == before
    pickle.loads(pickle.dumps(_Bomb(outside))).close()  # it does run where it is opened
    assert outside.exists()


def test_a_sparse_file_is_left_out(tmp_path):
    """Its header goes on in blocks of its own, which are no members."""
    (tmp_path / "a.txt").write_bytes(b"before")
    with open(tmp_path / "s.jpg", "wb") as file:
        for n in range(1, 30):
            file.seek(n * 65536)
            file.write(b"x" * 4096)
    (tmp_path / "z.txt").write_bytes(b"behind")
    for tar_format in ("gnu", "posix"):
        tar = ["tar", "-S", f"--format={tar_format}", "-cf", "t.tar", "a.txt", "s.jpg", "z.txt"]
        subprocess.run(tar, cwd=tmp_path, check=True)
        samples, rejects = _read(tmp_path / "t.tar")
        assert samples == [Sample("a", {"txt": b"before"}), Sample("z", {"txt": b"behind"})]
        assert [r.reason for r in rejects] == ["unread_member"]


# ---------------------------------------------------------------- cut archives


@pytest.mark.parametrize("name", ["00007.tar", "00007.tar.gz"])
def test_fifty_random_cuts_are_told(tmp_path, name):
    written = _webdataset(tmp_path / name, 12, seed=3)
    data = (tmp_path / name).read_bytes()
    cut = tmp_path / "cut" / name
    cut.parent.mkdir()
    told = 0
    for seed in range(50):
        length = random.Random(seed).randrange(len(data))
        cut.write_bytes(data[:length])
        samples, rejects = _read(cut)
        print(f"seed {seed}: {length} of {len(data)} bytes, {len(samples)} of 12 samples, {rejects}")
        assert samples == written[: len(samples)]  # whole ones, in order
        assert [(r.key, r.reason) for r in rejects] == [(name, "cut_shard")] and name in rejects[0].detail
        told += 1
    assert told == 50


def test_every_kind_of_cut(tmp_path):
    """Two samples of two members, a header and a block each: the end marker stands at 4096 of 10240 bytes."""
    path = _archive(tmp_path / "t.tar", [(name, b"123") for name in ("a.jpg", "a.txt", "b.jpg", "b.txt")])
    data = path.read_bytes()
    assert len(data) == 10240 and not any(data[4096:])
    cases = {  # bytes left: (samples that stand, a document is lost, what is said)
        0: (0, True, "without an end marker, at byte 0"),
        100: (0, True, "within a header"),
        512: (0, True, "within member 'a.jpg', at byte 512; sample a is left out"),
        1000: (0, True, "within member 'a.jpg', at byte 1000; sample a is left out"),  # in what fills its block
        2048: (0, True, "without an end marker, at byte 2048; sample a, which may miss members, is left out"),
        2560: (1, True, "within member 'b.jpg', at byte 2560; sample b is left out"),
        4000: (1, True, "within member 'b.txt', at byte 4000; sample b, which may miss members, is left out"),
        4096: (1, True, "without an end marker, at byte 4096; sample b, which may miss members, is left out"),
        4100: (1, True, "within a header, at byte 4100; sample b, which may miss members, is left out"),
        4608: (2, False, "within its end marker"),
        5000: (2, False, "within its end marker"),
        5120: (2, False, "within the padding"),
        10239: (2, False, "within the padding"),
    }
    for length, (stand, lost, said) in cases.items():
        path.write_bytes(data[:length])
        samples, (reject,) = _read(path)
        print(f"{length}: {reject}")
        assert (len(samples), reject.whole, reject.reason) == (stand, lost, "cut_shard")
        assert said in reject.detail
    path.write_bytes(data)
    assert len(_read(path)[0]) == 2 and not _read(path)[1]


def test_a_damaged_header_ends_the_archive(tmp_path):
    written = _webdataset(tmp_path / "t.tar", 3)
    data = bytearray((tmp_path / "t.tar").read_bytes())
    with tarfile.open(tmp_path / "t.tar") as archive:
        start = archive.getmember("000000002.txt").offset
    data[start + 3] ^= 1
    (tmp_path / "t.tar").write_bytes(data)
    samples, (reject,) = _read(tmp_path / "t.tar")
    assert (
        samples == written[:2] and reject.reason == "cut_shard" and f"damaged header at byte {start}" in reject.detail
    )


FORMATS = st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])


@given(st.data())
def test_garbage_never_raises(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "garbage.tar"
    _archive(
        path,
        [(f"{'n' * 120}.txt", b"123"), ("b.txt", b"45")],
        data.draw(FORMATS),
    )
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, 4000))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    _read(path)


@pytest.mark.parametrize("size", ["9" * 5000, "-1", "²", "1e3"])
def test_a_size_that_is_none(tmp_path, size):
    info = tarfile.TarInfo("a.txt")
    info.pax_headers = {"size": size}
    samples, (reject,) = _read(_archive(tmp_path / "t.tar", [info]))
    assert not samples and reject.reason == "cut_shard" and reject.detail.endswith("(size)")


def test_joined_archives_are_told(tmp_path):
    first, second = (_archive(tmp_path / f"{n}.tar", [(f"{n}.txt", b"1")]) for n in "ab")
    joined = tmp_path / "joined.tar"
    joined.write_bytes(first.read_bytes() + second.read_bytes())
    samples, (reject,) = _read(joined)
    assert [s.name for s in samples] == ["a"] and reject.reason == "data_after_end" and reject.whole


def test_a_damaged_gzip_is_told(tmp_path):
    _webdataset(tmp_path / "t.tar.gz", 4)
    data = bytearray((tmp_path / "t.tar.gz").read_bytes())
    data[-6] ^= 1  # its checksum
    (tmp_path / "t.tar.gz").write_bytes(data)
    samples, (reject,) = _read(tmp_path / "t.tar.gz")
    assert len(samples) == 3 and reject.reason == "cut_shard" and "cannot be unpacked" in reject.detail


def test_other_writers_fill_archives_otherwise(tmp_path):
    """GNU tar's own filling is checked; of `tar -b 1` and of writers that do not fill, the size tells nothing."""
    for name in ("a.jpg", "a.txt"):
        (tmp_path / name).write_bytes(b"123")

    def tar(*options: str):
        subprocess.run(["tar", *options, "-cf", "t.tar", "a.jpg", "a.txt"], cwd=tmp_path, check=True)
        return tmp_path / "t.tar"

    assert not _read(tar())[1] and not _read(tar("--format=posix"))[1]
    data = tar().read_bytes()
    (tmp_path / "cut.tar").write_bytes(data[:-512])
    assert "10240" in _read(tmp_path / "cut.tar")[1][0].detail
    small = tar("-b", "1")
    assert small.stat().st_size == 3072
    samples, (reject,) = _read(small)
    assert len(samples) == 1 and not reject.whole  # reported as cut, though nothing is lost
    assert not _read(small, record_bytes=512)[1]
    # A writer that gives every member numbers of devices, as Go's does, ends right behind the end marker.
    info = tarfile.TarInfo("a.txt")
    info.size = 3
    header = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
    header[329:345] = b"0000000\0" * 2
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    (tmp_path / "go.tar").write_bytes(bytes(header) + b"123".ljust(512, b"\0") + bytes(1024))
    assert _read(tmp_path / "go.tar") == ([Sample("a", {"txt": b"123"})], [])
