"""Image-text pairs: tars, parquet files and COCO, in the forms in which they are published."""

import io
import json
import tarfile

import numpy as np
import pyarrow as pa
import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as PIL
from pyarrow import parquet

from emu_jax.data.document import Text
from emu_jax.data.raw.reader import RawDocument, RawImage, Reject
from emu_jax.data.raw.readers.coco import Coco
from emu_jax.data.raw.readers.pairs import ImageText
from emu_jax.errors import UserError


def _jpeg(shade: int) -> bytes:
    buffer = io.BytesIO()
    PIL.fromarray(np.full((8, 8, 3), shade, np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


def _tar(path, *samples: dict):
    with webdataset.TarWriter(str(path), encoder=False) as writer:
        for sample in samples:
            writer.write(
                {key: v if key == "__key__" or isinstance(v, bytes) else v.encode() for key, v in sample.items()}
            )
    return path


def _read(reader, path):
    """Documents by their keys, and (key, reason, whole) of the rejects."""
    found = [item for shard in reader.shards(str(path)) for item in reader.read(shard)]
    documents = [item for item in found if isinstance(item, RawDocument)]
    assert len({document.key for document in documents}) == len(documents)
    return {d.key: d for d in documents}, [(r.key, r.reason, r.whole) for r in found if isinstance(r, Reject)]


def _pair(key: str, data: bytes, text: str, score: float | None = None) -> RawDocument:
    return RawDocument(key, "pair", (RawImage(data, score), Text(text)))


# ---------------------------------------------------------------- tars


def _img2dataset(folder, number: int, samples: int, told: int | None = None):
    """A shard of img2dataset's: the tar, a parquet file without images, and counts."""
    names = [f"{number:05d}{n:04d}" for n in range(samples)]
    rows = [{"caption": f"text {n}", "url": "u", "key": name, "status": "success"} for n, name in enumerate(names)]
    _tar(
        folder / f"{number:05d}.tar",
        *(
            {"__key__": row["key"], "jpg": _jpeg(n), "txt": row["caption"], "json": json.dumps(row)}
            for n, row in enumerate(rows)
        ),
    )
    parquet.write_table(pa.Table.from_pylist(rows), folder / f"{number:05d}.parquet")
    stats = {"count": samples + 3, "successes": samples if told is None else told, "failed_to_download": 3}
    (folder / f"{number:05d}_stats.json").write_text(json.dumps(stats))


def test_img2dataset_s_folder(tmp_path):
    _img2dataset(tmp_path, 0, 3)
    _img2dataset(tmp_path, 1, 2)
    assert ImageText().shards(str(tmp_path)) == [f"{tmp_path}//00000.tar", f"{tmp_path}//00001.tar"]
    documents, rejects = _read(ImageText(), tmp_path)
    assert not rejects
    assert list(documents.values()) == [
        _pair("00000.tar/000000000", _jpeg(0), "text 0"),
        _pair("00000.tar/000000001", _jpeg(1), "text 1"),
        _pair("00000.tar/000000002", _jpeg(2), "text 2"),
        _pair("00001.tar/000010000", _jpeg(0), "text 0"),
        _pair("00001.tar/000010001", _jpeg(1), "text 1"),
    ]


def test_a_file_a_glob_and_folders_give_the_same_documents(tmp_path):
    for part in ("p", "q"):
        (tmp_path / part).mkdir()
        _img2dataset(tmp_path / part, 0, 1)
    keys = ["p/00000.tar/000000000", "q/00000.tar/000000000"]
    assert list(_read(ImageText(), tmp_path)[0]) == keys
    assert list(_read(ImageText(), f"{tmp_path}/*/0*.tar")[0]) == keys
    assert list(_read(ImageText(), tmp_path / "p" / "00000.tar")[0]) == ["00000.tar/000000000"]


def test_counts_that_differ_are_told(tmp_path):
    _img2dataset(tmp_path, 0, 3, told=5)
    documents, rejects = _read(ImageText(), tmp_path)
    assert len(documents) == 3 and rejects == [("00000.tar", "count_differs", False)]
    tar = tmp_path / "00000.tar"
    tar.write_bytes(tar.read_bytes()[:5000])
    assert _read(ImageText(), tmp_path)[1] == [("00000.tar", "cut_shard", True)]  # said once


def test_what_a_sample_may_lack(tmp_path):
    good = {"jpg": _jpeg(0), "txt": "fine"}
    _tar(
        tmp_path / "t.tar",
        {"__key__": "a", "txt": "no image"},
        {"__key__": "b", "jpg": b"", "txt": "an empty image"},
        {"__key__": "c", **good, "txt": " \n\0 "},
        {"__key__": "d", **good, "txt": "x" * 21},
        {"__key__": "e", **good, "txt": b"\xff\xfe"},
        {"__key__": "f", **good, "json": "{"},
        {"__key__": "g", "jpg": _jpeg(1), "json": "{"},
        {"__key__": "h", "jpg": _jpeg(1), "json": json.dumps({"caption": "\ud800"})},
        {"__key__": "i", "jpg": _jpeg(1), "json": "[" * 100_000},
        {"__key__": "j", "jpg": _jpeg(1), "json": "[]"},
        {"__key__": "k", **good, "txt": "  two\nlines\0 "},
    )
    documents, rejects = _read(ImageText(max_characters=20), tmp_path / "t.tar")
    assert list(documents.values()) == [
        _pair("t.tar/f", _jpeg(0), "fine"),
        _pair("t.tar/k", _jpeg(0), "two\nlines"),
    ]
    assert rejects == [
        ("t.tar/a", "no_image", True),
        ("t.tar/b", "no_image", True),
        ("t.tar/c", "no_text", True),
        ("t.tar/d", "text_too_long", True),
        ("t.tar/e", "unreadable_text", True),
        ("t.tar/f.json", "unreadable_json", False),
        ("t.tar/g", "unreadable_json", True),
        ("t.tar/h", "unreadable_text", True),
        ("t.tar/i", "unreadable_json", True),
        ("t.tar/j", "unreadable_json", True),
    ]


def test_captions_and_scores_come_from_the_fields_that_are_set(tmp_path):
    fields = {"TEXT": "alt text", "top_caption": "a cat", "all_captions": ["", "a", "b"], "similarity": 0.31}
    _tar(
        tmp_path / "t.tar",
        {"__key__": "a", "jpg": _jpeg(0), "txt": "the member", "json": json.dumps(fields)},
        {"__key__": "b", "jpg": _jpeg(0), "json": json.dumps({**fields, "top_caption": " ", "similarity": "high"})},
    )

    def texts(*caption: str):
        documents, _ = _read(ImageText(caption=caption), tmp_path / "t.tar")
        return [d.parts[1].text for d in documents.values()]

    assert texts("txt", "TEXT") == ["the member", "alt text"]
    assert texts("top_caption", "TEXT") == ["a cat", "alt text"]
    assert texts("all_captions") == ["a", "a"]
    documents, _ = _read(ImageText(), tmp_path / "t.tar")
    assert [d.parts[0].score for d in documents.values()] == [0.31, None]


def test_a_hostile_tar_gives_the_good_pairs(tmp_path):
    with tarfile.open(tmp_path / "t.tar", "w") as archive:
        for name, data in (("a.jpg", _jpeg(0)), ("../a.txt", b"evil"), ("a.pyd", b"evil"), ("a.txt", b"good")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    documents, rejects = _read(ImageText(), tmp_path)
    assert list(documents.values()) == [_pair("t.tar/a", _jpeg(0), "good")]
    assert [reason for _, reason, _ in rejects] == ["unsafe_member", "pickle_member"]


CAPTIONS = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


@given(st.lists(CAPTIONS, max_size=8))
def test_any_captions_come_back(tmp_path_factory, captions):
    path = tmp_path_factory.getbasetemp() / "any.tar"
    _tar(path, *({"__key__": f"{n:04d}", "png": b"p", "txt": caption} for n, caption in enumerate(captions)))
    documents, rejects = _read(ImageText(), path)
    kept = {n: text for n, c in enumerate(captions) if (text := c.removeprefix("\ufeff").replace("\0", "").strip())}
    assert {key: d.parts[1].text for key, d in documents.items()} == {f"any.tar/{n:04d}": t for n, t in kept.items()}
    assert [r for r in rejects if r[1] == "no_text"] == rejects and len(rejects) + len(kept) == len(captions)


# ---------------------------------------------------------------- parquet


def test_parquet_as_hugging_face_writes_it(tmp_path):
    rows = [
        {"image": {"bytes": _jpeg(n), "path": f"{n}.jpg"}, "text": f"text {n}", "similarity": 0.5} for n in range(150)
    ]
    rows[3]["image"] = {"bytes": None, "path": "3.jpg"}
    rows[4]["text"] = ""
    rows[5]["text"] = None
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "train-00000.parquet", row_group_size=70)
    documents, rejects = _read(ImageText(), tmp_path)
    assert len(documents) == 147
    assert documents["train-00000.parquet/000000149"] == _pair(
        "train-00000.parquet/000000149", _jpeg(149), "text 149", 0.5
    )
    assert rejects == [
        ("train-00000.parquet/000000003", "no_image", True),
        ("train-00000.parquet/000000004", "no_text", True),
        ("train-00000.parquet/000000005", "no_text", True),
    ]


@pytest.mark.parametrize("image", ["jpg", "image", "image.bytes"])
@pytest.mark.parametrize("caption", ["caption", "text", "TEXT"])
def test_parquet_with_plain_columns(tmp_path, image, caption):
    table = pa.table({image: [_jpeg(0)], caption: ["a"], "url": ["u"]})
    parquet.write_table(table, tmp_path / "t.parquet")
    assert list(_read(ImageText(), tmp_path)[0].values()) == [_pair("t.parquet/000000000", _jpeg(0), "a")]


def test_parquet_that_is_cut_or_holds_no_images(tmp_path):
    parquet.write_table(pa.table({"jpg": [_jpeg(0)] * 9, "caption": ["a"] * 9}), tmp_path / "a.parquet")
    parquet.write_table(pa.table({"image": ["u"], "caption": ["a"]}), tmp_path / "b.parquet")
    data = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "c.parquet").write_bytes(data[:-5])
    documents, rejects = _read(ImageText(), tmp_path)
    assert len(documents) == 9
    assert rejects == [("b.parquet", "no_column", True), ("c.parquet", "cut_shard", True)]
    with pytest.raises(
        UserError, match=r"columns caption, image; expected an image's bytes in one of jpg, .*: name yours"
    ):
        ImageText().shards(str(tmp_path / "b.parquet"))


def test_parquet_text_that_is_not_utf_8(tmp_path):
    captions = pa.array([b"good", b"\xff", b"good"], pa.binary()).view(pa.string())
    parquet.write_table(pa.table({"jpg": [_jpeg(0)] * 3, "caption": captions}), tmp_path / "t.parquet")
    documents, rejects = _read(ImageText(), tmp_path)
    assert list(documents) == ["t.parquet/000000000", "t.parquet/000000002"]
    assert rejects == [("t.parquet/000000001", "unreadable_text", True)]


def test_parquet_that_is_damaged_within_gives_what_stands_before(tmp_path):
    """Three row groups with checksums; the last one's images are overwritten."""
    images = [np.random.default_rng(n).bytes(1000) for n in range(300)]
    table = pa.table({"jpg": images, "caption": [f"text {n}" for n in range(300)]})
    parquet.write_table(
        table,
        tmp_path / "t.parquet",
        row_group_size=100,
        write_page_checksum=True,
        compression="none",
        use_dictionary=False,
    )
    data = bytearray((tmp_path / "t.parquet").read_bytes())
    place = data.index(images[250])
    data[place] ^= 1
    (tmp_path / "t.parquet").write_bytes(data)
    documents, rejects = _read(ImageText(), tmp_path)
    assert 128 <= len(documents) <= 250 and rejects == [("t.parquet", "cut_shard", True)]


def test_wrong_paths_and_settings_are_user_errors(tmp_path):
    for path in (tmp_path, tmp_path / "none.tar", tmp_path / "*.tar"):
        with pytest.raises(UserError, match="expected image-text pairs in tars, Parquet or Arrow files"):
            ImageText().shards(str(path))
    with pytest.raises(UserError, match="expected one or more names"):
        ImageText(caption="txt")
    with pytest.raises(UserError, match="choose first or all"):
        Coco(captions="every")


# ---------------------------------------------------------------- COCO


def _coco(folder, images, annotations):
    (folder / "annotations").mkdir()
    file = folder / "annotations" / "captions_train2017.json"
    file.write_text(json.dumps({"info": {}, "images": images, "annotations": annotations}))
    return file


def test_coco_as_it_is_laid_out(tmp_path):
    (tmp_path / "train2017").mkdir()
    for n in (7, 9):
        (tmp_path / "train2017" / f"{n:012d}.jpg").write_bytes(_jpeg(n))
    listed = [{"id": n, "file_name": f"{n:012d}.jpg", "height": 8, "width": 8} for n in (9, 7, 8, 7)]
    listed += [{"id": 10, "file_name": "../secret.jpg"}, {"id": 11, "file_name": "/etc/passwd"}, {"id": 12}, {}]
    captions = [(7, " "), (7, "a cat. "), (9, "a dog."), (7, "the cat"), (8, "no file")]
    captions += [(10, "out"), (11, "out"), (12, "no name"), (13, "no image")]
    _coco(tmp_path, listed, [{"id": n, "image_id": i, "caption": c} for n, (i, c) in enumerate(captions)])
    name = "annotations/captions_train2017.json"
    documents, rejects = _read(Coco(), tmp_path)
    assert list(documents.values()) == [_pair(f"{name}/9", _jpeg(9), "a dog."), _pair(f"{name}/7", _jpeg(7), "a cat.")]
    assert rejects == [
        (f"{name}/8", "missing_image", True),
        (f"{name}/7", "repeated_key", True),
        (f"{name}/10", "unsafe_path", True),
        (f"{name}/11", "unsafe_path", True),
        (f"{name}/12", "missing_image", True),
        (f"{name}/#7", "no_id", True),
        (f"{name}/13", "missing_image", True),
    ]
    documents, _ = _read(Coco(captions="all", images="../train2017"), tmp_path)
    assert documents[f"{name}/7"].parts[1] == Text("a cat.\nthe cat")


def test_coco_that_is_cut_or_something_else(tmp_path):
    file = _coco(tmp_path, [{"id": 1, "file_name": "a.jpg"}], [{"image_id": 1, "caption": "one"}])
    data = file.read_text()
    for length in range(len(data)):
        file.write_text(data[:length])
        _, rejects = _read(Coco(), file)
        assert rejects == [("captions_train2017.json", "cut_shard", True)], data[:length]
    file.write_text('{"images": 1}')
    assert _read(Coco(), file)[1] == [("captions_train2017.json", "not_coco", True)]
    file.write_text(data.replace(":", ";"))
    assert _read(Coco(), file)[1] == [("captions_train2017.json", "unreadable_json", True)]
    with pytest.raises(UserError, match=r"Coco\.images='none': no folder .*/annotations/none"):
        Coco(images="none").shards(str(tmp_path))
    with pytest.raises(UserError, match="expected COCO's captions"):
        Coco().shards(str(tmp_path / "none"))
