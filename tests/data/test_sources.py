"""Sources: what documents a record gives, by its kind."""

import gzip
import hashlib
from pathlib import Path

import numpy as np
import pytest
import zstandard

from emu_jax.data.document import Document, Image, Text
from emu_jax.data.frames import FrameSampling
from emu_jax.data.images import EncodedImage
from emu_jax.data.prepared import Record, Records
from emu_jax.data.sources import PairOrder, Prepared, open_source, subsequences
from emu_jax.data.system_messages import VIDEO_SYSTEM
from emu_jax.errors import UserError
from tests.data.folders import SIZE, image, write_folder


def spelt(document: Document) -> str:
    """P for an image, else the text."""
    return " ".join("P" if isinstance(part, Image) else part.text for part in document.parts)


RECORDS = {
    "pair": Record("0", "pair", (image(0), Text("a cat"))),
    "video": Record("1", "video", (*(image(n) for n in range(3)), Text("a cat runs"))),
    "web": Record("2", "web", (Text("cats"), image(0), Text("one"), image(1), Text("two"))),
    "storyboard": Record("3", "storyboard", (image(0), Text("said"), image(1))),
    "chat": Record("4", "chat", (image(0), Text("what?", "user"), Text("a cat", "assistant"))),
}


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("pair", {"P a cat", "a cat P"}),
        ("video", {"P P P a cat runs", "a cat runs P P P"}),
        ("web", {"cats P one P two"}),
        ("storyboard", {"P said P"}),
        ("chat", {"P what? a cat"}),
    ],
)
def test_documents_by_kind(tmp_path, kind, expected):
    source = Prepared(
        Records(write_folder(tmp_path / kind, [RECORDS[kind]], shards=1), "train"), SIZE, PairOrder("random")
    )
    found = [source.documents(*source.read([0]), np.random.default_rng(seed))[0] for seed in range(20)]
    assert {spelt(document) for document in found} == expected
    images = [part for part in found[0].parts if isinstance(part, Image)]
    assert len({image.key for image in images}) == len(images)
    assert all(image.pixels.shape == (SIZE, SIZE, 3) for image in images)


def frames_of(document: Document) -> list[int]:
    """The numbers among the record's parts of the images that a document shows."""
    return [int(part.key.rpartition("#")[2]) for part in document.parts if isinstance(part, Image)]


TURNS = (Text("what?", "user"), Text("a cat", "assistant"))
STORED = {
    "video": Record("0", "video", (*(image(n) for n in range(24)), Text("a cat runs"))),
    "short": Record("1", "video", (*(image(n) for n in range(5)), Text("a cat"))),
    "old": Record("2", "video", (*(image(n) for n in range(8)), Text("a cat sits"))),
    "video_chat": Record("3", "video_chat", (Text(VIDEO_SYSTEM, "system"), *(image(n) for n in range(24)), *TURNS)),
    "old_chat": Record("4", "chat", (Text(VIDEO_SYSTEM, "system"), *(image(n) for n in range(8)), *TURNS)),
    "images": Record("5", "chat", (*(image(n) for n in range(10)), *TURNS)),  # ten images are no video
}


@pytest.mark.parametrize(
    ("name", "sampling", "expected"),
    [
        ("video", FrameSampling(8, "fixed"), [1, 4, 7, 10, 13, 15, 18, 21]),
        ("video", FrameSampling(2, "fixed"), [5, 17]),  # g = 11.5: 5 + round(0, 11.5)
        ("short", FrameSampling(8, "fixed"), [0, 1, 2, 3, 4]),
        ("short", FrameSampling(8, "random"), [0, 1, 2, 3, 4]),
        ("old", FrameSampling(8, "fixed"), [0, 1, 2, 3, 4, 5, 6, 7]),
        ("old", FrameSampling(8, "random"), [0, 1, 2, 3, 4, 5, 6, 7]),
        ("video_chat", FrameSampling(8, "fixed"), [2, 5, 8, 11, 14, 16, 19, 22]),  # one on: the system message
        ("old_chat", FrameSampling(8, "random"), [1, 2, 3, 4, 5, 6, 7, 8]),
        ("images", FrameSampling(8, "random"), [*range(10)]),
    ],
)
def test_frames_of_a_video(tmp_path, name, sampling, expected):
    folder = write_folder(tmp_path / name, [STORED[name]], shards=1)
    source = open_source(str(folder), "train", SIZE, PairOrder("image_first"), frames=sampling)
    (document,) = source.documents(*source.read([0]), np.random.default_rng(0))
    assert frames_of(document) == expected
    assert [part for part in document.parts if isinstance(part, Text)] == [
        part for part in STORED[name].parts if isinstance(part, Text)
    ]


@pytest.mark.parametrize("name", ["video", "video_chat"])
def test_random_frames_of_a_video(tmp_path, name):
    """Eight at every visit, in order, others at each; their pixels are those of the stored frames."""
    source = Prepared(
        Records(write_folder(tmp_path / name, [STORED[name]], shards=1), "train"), SIZE, PairOrder("random")
    )
    visits = [source.documents(*source.read([0]), np.random.default_rng(seed))[0] for seed in range(40)]
    shown = [frames_of(document) for document in visits]
    assert all(len(set(frames)) == 8 and frames == sorted(frames) for frames in shown)
    assert len({tuple(frames) for frames in shown}) > 30
    first = 1 if name == "video_chat" else 0
    assert {frame - first for frames in shown for frame in frames} == set(range(24))
    images = {part.key: part.pixels for document in visits for part in document.parts if isinstance(part, Image)}
    for key, pixels in images.items():
        expected = EncodedImage(image(int(key.rpartition("#")[2]) - first).data, SIZE, key)()
        np.testing.assert_array_equal(pixels, expected, err_msg=key)


def test_mmc4_s_two_sequences():
    pixels = np.zeros((1, 1, 3), np.uint8)
    parts = [part for n in range(7) for part in (Image(pixels, str(n)), Text(f"s{n}\nmore"), Text("and"))]
    first, second = subsequences(parts, np.random.default_rng(0))
    with_images = " ".join(f"P s{n}\nmore and" for n in range(5))
    assert spelt(first) == f"{with_images} s5\nmore and s6\nmore and"
    assert first.max_tokens == 1024 and second.max_tokens == 512
    assert [part.key for part in second.parts if isinstance(part, Image)] == ["1", "2", "3", "4", "6"]
    assert spelt(second) == "P s1 P s2 P s3 P s4 P s6"
    text = Text("no image")
    assert subsequences([text], np.random.default_rng(0)) == [Document((text,), max_tokens=1024)]


def test_names_that_are_no_source(tmp_path):
    with pytest.raises(UserError, match=r"config\.data source 'nowhere': no such folder; expected"):
        open_source("nowhere", "train", SIZE, PairOrder())
    with pytest.raises(UserError, match=r"no manifest\.json in it"):
        open_source(str(tmp_path), "train", SIZE, PairOrder())


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.jsonl.gz", "a.ndjson.zst"])
def test_a_jsonl_by_its_other_names(tmp_path, name):
    lines = b"".join(b'{"parts": [{"text": "%d"}]}\n' % n for n in range(3))
    pack = {".gz": gzip.compress, ".zst": zstandard.compress}.get(Path(name).suffix, bytes)
    path = tmp_path / name
    path.write_bytes(pack(lines))
    source = open_source(str(path), "", 8, PairOrder())
    assert source.texts() == ["0", "1", "2"] and source.fingerprint == hashlib.sha256(lines).hexdigest()
    if pack is not bytes:
        path.write_bytes(pack(lines)[:-2])
        with pytest.raises(UserError, match=rf"{name}: cannot be unpacked \(.*; copy it again"):
            open_source(str(path), "", 8, PairOrder())


def test_other_files_are_to_be_prepared(tmp_path):
    (tmp_path / "a.parquet").touch()
    with pytest.raises(UserError, match=r"a\.parquet': files of this kind are not .*by `emu-jax prepare`"):
        open_source(str(tmp_path / "a.parquet"), "", 8, PairOrder())
