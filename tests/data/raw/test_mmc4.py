"""MMC4's records as published: literal documents, the similarity rule, and what is broken."""

import gzip
import io
import json
import tarfile
import zipfile

import pytest

from emu_jax.data.document import Text
from emu_jax.data.raw.reader import RawDocument, RawImage, Reject
from emu_jax.data.raw.readers.mmc4 import Mmc4
from emu_jax.errors import UserError

TEXTS = ["One.", "Two.", "Three."]
# Readers do not decode: any bytes stand for an image here.
RECORD = {
    "text_list": TEXTS,
    "url": "https://a.example/page",
    "image_info": [
        {"image_name": "a.jpg", "raw_url": "https://a.example/a.jpg", "matched_text_index": 2, "matched_sim": 0.40},
        {"image_name": "b.jpg", "raw_url": "https://a.example/b.jpg", "matched_text_index": 0, "matched_sim": 0.32},
        {"image_name": "c.jpg", "raw_url": "https://a.example/c.jpg", "matched_text_index": 2, "matched_sim": 0.33},
        {"image_name": "a.jpg", "raw_url": "https://a.example/d.jpg", "matched_text_index": 1, "matched_sim": 0.31},
        {"image_name": "e.jpg", "raw_url": "https://a.example/e.jpg", "matched_text_index": 1, "matched_sim": 0.50},
    ],
    "similarity_matrix": [[0.1, 0.2, 0.4], [0.32, 0.1, 0.1], [0.1, 0.1, 0.33], [0.1, 0.31, 0.1], [0.1, 0.5, 0.1]],
}
PARTS = (
    RawImage(b"B", 0.32),
    Text("One."),
    Text("Two."),
    RawImage(b"A", 0.40),
    RawImage(b"C", 0.33),
    Text("Three."),
)
IMAGES = {"a.jpg": b"A", "b.jpg": b"B", "c.jpg": b"C"}
SHARD = "docs_no_face_shard_0_v2.jsonl"


def _folder(path, *records):
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    (path / SHARD).write_text("\n".join(lines) + "\n")
    (path / "images").mkdir(exist_ok=True)
    for name, data in IMAGES.items():
        (path / "images" / name).write_bytes(data)
    return str(path)


def _tar(images) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, data in images.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return stream.getvalue()


def _all(path, reader=None):
    reader = reader or Mmc4()
    return [got for shard in reader.shards(str(path)) for got in reader.read(shard)]


def _rejects(got):
    return [(reject.key, reject.reason, reject.whole) for reject in got if isinstance(reject, Reject)]


REJECTS = [(f"{SHARD}/0#3", "low_similarity", False), (f"{SHARD}/0#4", "missing_image", False)]


def test_a_record(tmp_path):
    got = _all(_folder(tmp_path, RECORD))
    assert got[-1] == RawDocument(f"{SHARD}/0", "web", PARTS)
    assert _rejects(got) == REJECTS
    assert got[0].detail == "similarity 0.310; at least 0.32 is kept"


def test_images_in_a_tar(tmp_path):
    _folder(tmp_path, RECORD)
    (tmp_path / "docs_no_face_shard_0_v2.tar").write_bytes(_tar({f"./{name}": data for name, data in IMAGES.items()}))
    got = _all(tmp_path, Mmc4(images="{shard}.tar"))
    assert got[-1] == RawDocument(f"{SHARD}/0", "web", PARTS)
    assert _rejects(got) == REJECTS


def test_a_tar_that_breaks_off(tmp_path):
    _folder(tmp_path, RECORD)
    (tmp_path / "p.tar").write_bytes(_tar({"a.jpg": b"A", "c.jpg": b"C" * 3000, "b.jpg": b"B"})[: 3 * 512 + 1000])
    got = _all(tmp_path, Mmc4(images="p.tar"))
    assert got[-1].parts == (Text("One."), Text("Two."), RawImage(b"A", 0.40), Text("Three."))
    assert _rejects(got)[:3] == [
        (f"{SHARD}#images", "cut_shard", False),
        (f"{SHARD}/0#1", "missing_image", False),
        (f"{SHARD}/0#2", "missing_image", False),
    ]


@pytest.mark.parametrize("end", [".zip", ".gz"])
def test_packed_shards(tmp_path, end):
    _folder(tmp_path, RECORD)
    plain, packed = tmp_path / SHARD, tmp_path / f"{SHARD}{end}"
    if end == ".gz":
        packed.write_bytes(gzip.compress(plain.read_bytes()))
    else:
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.write(plain, SHARD)
    assert len(Mmc4().shards(str(tmp_path))) == 1  # the same file twice is read once
    plain.unlink()
    assert _all(tmp_path)[-1] == RawDocument(f"{SHARD}{end}/0", "web", PARTS)
    packed.write_bytes(packed.read_bytes()[:-9])
    got = _all(tmp_path)
    assert got[-1].reason == "cut_shard" and got[-1].key == f"{SHARD}{end}"


def test_scores_from_the_matrix(tmp_path):
    bare = RECORD | {"image_info": [{"image_name": info["image_name"]} for info in RECORD["image_info"][:3]]}
    bare["similarity_matrix"] = [[0.1, 0.6, 0.5], [0.1, 0.7, 0.1], [0.4, 0.1, 0.1]]
    # The largest sum: the first takes its second best, for the second needs the same sentence more.
    one, two, three = map(Text, TEXTS)
    expected = (RawImage(b"C", 0.4), one, RawImage(b"B", 0.7), two, RawImage(b"A", 0.5), three)
    assert _all(_folder(tmp_path, bare))[-1].parts == expected
    bare["image_info"] = [{"image_name": "a.jpg", "matched_text_index": 1}]
    bare["similarity_matrix"] = [[0.9, 0.6, 0.5]]
    assert _all(_folder(tmp_path, bare))[-1].parts == (one, RawImage(b"A", 0.6), two, three)


def test_a_record_without_scores(tmp_path):
    bare = RECORD | {"image_info": [{"image_name": "a.jpg", "matched_text_index": 1}], "similarity_matrix": None}
    got = _all(_folder(tmp_path, bare))
    assert _rejects(got) == [(f"{SHARD}/0#0", "no_similarity", False), (f"{SHARD}/0", "no_image", True)]
    assert "name a folder of CLIP weights as `clip`" in got[0].detail


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"text_list": None}, "unreadable_record"),
        ({"text_list": ["a", 1]}, "unreadable_record"),
        ({"text_list": ["\ud800", "b", "c"]}, "unreadable_text"),
        ({"text_list": []}, "no_text"),
        ({"image_info": None}, "unreadable_record"),
        ({"image_info": [1]}, "unreadable_record"),
        ({"image_info": []}, "no_image"),
        ({"image_info": [{"image_name": "a.jpg", "matched_text_index": 0, "matched_sim": float("nan")}]}, "no_image"),
        ({"image_info": [{"image_name": "../x", "matched_text_index": 0, "matched_sim": 0.5}]}, "no_image"),
        ({"image_info": [{"image_name": 3, "matched_text_index": 0, "matched_sim": 0.5}]}, "no_image"),
        ({"image_info": [{"image_name": "a.jpg", "matched_text_index": 9, "matched_sim": 0.5}]}, "no_image"),
        (
            {"image_info": [{"image_name": "a.jpg", "matched_text_index": 10**400, "matched_sim": 10**400}]},
            "no_image",
        ),
        ({"image_info": [{}], "similarity_matrix": [["x", [], 10**400]]}, "no_image"),
    ],
)
def test_broken_records(tmp_path, change, reason):
    got = _all(_folder(tmp_path, RECORD | change, RECORD))
    assert _rejects(got)[-3] == (f"{SHARD}/0", reason, True)
    assert got[-1] == RawDocument(f"{SHARD}/1", "web", PARTS)


def test_broken_lines(tmp_path):
    got = _all(_folder(tmp_path, '{"text_list": [', "[]", "", "\ufeff{]", RECORD))
    assert _rejects(got)[:3] == [
        (f"{SHARD}/0", "unreadable_json", True),
        (f"{SHARD}/1", "unreadable_record", True),
        (f"{SHARD}/3", "unreadable_json", True),
    ]
    assert got[-1] == RawDocument(f"{SHARD}/4", "web", PARTS)
    text = (tmp_path / SHARD).read_bytes()
    (tmp_path / SHARD).write_bytes(text + json.dumps(RECORD).encode()[:300])
    got = _all(tmp_path)
    assert got[-2] == RawDocument(f"{SHARD}/4", "web", PARTS)
    assert got[-1] == Reject(SHARD, "cut_shard", f"{SHARD} ends within line 6")


def test_wrong_settings_and_paths(tmp_path):
    with pytest.raises(UserError, match=r"holds no \*.jsonl or .*; expected MMC4's docs_no_face_shard_0_v2.jsonl"):
        Mmc4().shards(str(tmp_path))
    _folder(tmp_path, RECORD)
    with pytest.raises(UserError, match=r"Mmc4.images='none'.*is not there; expected the images of"):
        Mmc4(images="none").shards(str(tmp_path))
    (tmp_path / "p.tar.gz").write_bytes(gzip.compress(_tar(IMAGES)))
    with pytest.raises(UserError, match=r"p.tar.gz is no plain tar"):
        Mmc4(images="p.tar.gz").shards(str(tmp_path))
    with pytest.raises(UserError, match=r"Mmc4.min_similarity='0.3'"):
        Mmc4(min_similarity="0.3")
