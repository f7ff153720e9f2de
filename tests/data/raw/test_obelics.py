"""OBELICS-like rows: the same literal documents from JSON lines, a JSON array and Parquet."""

import base64
import json

import pyarrow
import pyarrow.parquet
import pytest

from emu_jax.data.document import Text
from emu_jax.data.raw.reader import RawDocument, RawImage, Reject
from emu_jax.data.raw.readers.obelics import Obelics
from emu_jax.errors import UserError

CAT_URL, DOG_URL = "https://a.example/1/cat.jpg", "https://a.example/2/cat.jpg"
ROWS = [
    {"images": [None, CAT_URL, None], "texts": ["Cats\n\nare", None, "asleep"]},
    {"images": [CAT_URL, None, DOG_URL, None], "texts": [None, "one", None, None]},
    {"images": [DOG_URL], "texts": ["both"]},
]
# Readers do not decode: any bytes stand for an image here.
EXPECTED = [
    (Text("Cats\n\nare"), RawImage(b"CAT"), Text("asleep")),
    (RawImage(b"CAT"), Text("one"), RawImage(b"DOG")),
    (RawImage(b"DOG"), Text("both")),
]


def _write(path, rows, form):
    if form == "jsonl":
        (path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif form == "json":
        (path / "rows.json").write_text(json.dumps(rows))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path / "rows.parquet")


def _images(path):
    (path / "images").mkdir()
    (path / "images" / "0.jpg").write_bytes(b"CAT")
    (path / "images" / "1.jpg").write_bytes(b"DOG")
    (path / "names.json").write_text(json.dumps({CAT_URL: "0.jpg", DOG_URL: "1.jpg"}))


def _all(path, reader):
    return [got for shard in reader.shards(str(path)) for got in reader.read(shard)]


def _rejects(got):
    return [(reject.key, reject.reason, reject.whole) for reject in got if isinstance(reject, Reject)]


@pytest.mark.parametrize("form", ["jsonl", "json", "parquet"])
def test_rows(tmp_path, form):
    _write(tmp_path, ROWS, form)
    _images(tmp_path)
    got = _all(tmp_path, Obelics(images="images", names="names.json"))
    assert got == [RawDocument(f"rows.{form}/{number}", "web", parts) for number, parts in enumerate(EXPECTED)]


@pytest.mark.parametrize("cell", [b"CAT", {"bytes": b"CAT", "path": "cat.jpg"}])
def test_bytes_in_parquet(tmp_path, cell):
    _write(tmp_path, [{"images": [cell, None], "words": [None, "asleep"]}], "parquet")
    (got,) = _all(tmp_path, Obelics(image_column="images", text_column="words"))
    assert got.parts == (RawImage(b"CAT"), Text("asleep"))


def test_names_and_data_addresses(tmp_path):
    address = "data:image/png;base64," + base64.b64encode(b"DOG").decode()
    _write(tmp_path, [{"images": ["0.jpg", address], "texts": ["one", "two"]}], "jsonl")
    _images(tmp_path)
    (tmp_path / "names.json").unlink()
    (got,) = _all(tmp_path, Obelics(images="images"))
    assert got.parts == (RawImage(b"CAT"), Text("one"), RawImage(b"DOG"), Text("two"))


def test_images_that_are_not_there(tmp_path):
    rows = [
        {
            "images": ["https://a.example/3.jpg", "9.jpg", 5, "../names.json", "0.jpg"],
            "texts": ["a", "b", None, None, None],
        },
        {"images": ["9.jpg"], "texts": ["a"]},
        {"images": ["0.jpg"], "texts": [" "]},
        {"images": ["0.jpg"], "texts": [1]},
        {"images": ["0.jpg"], "texts": []},
        {"images": None, "texts": ["a"]},
    ]
    _write(tmp_path, rows, "jsonl")
    _images(tmp_path)
    got = _all(tmp_path, Obelics(images="images", names="names.json"))
    assert [document.parts for document in got if isinstance(document, RawDocument)] == [
        (Text("a"), Text("b"), RawImage(b"CAT"))
    ]
    assert _rejects(got) == [
        ("rows.jsonl/0#0", "missing_image", False),
        ("rows.jsonl/0#1", "missing_image", False),
        ("rows.jsonl/0#2", "missing_image", False),
        ("rows.jsonl/0#3", "unsafe_path", False),
        ("rows.jsonl/1#0", "missing_image", False),
        ("rows.jsonl/1", "no_image", True),
        ("rows.jsonl/2", "no_text", True),
        ("rows.jsonl/3", "unreadable_record", True),
        ("rows.jsonl/4", "unreadable_record", True),
        ("rows.jsonl/5", "unreadable_record", True),
    ]


@pytest.mark.parametrize("form", ["json", "parquet"])
def test_a_shard_that_breaks_off(tmp_path, form):
    _write(tmp_path, [{"images": ["0.jpg"], "texts": ["a"]}] * 3, form)
    _images(tmp_path)
    (tmp_path / "names.json").unlink()
    file = tmp_path / f"rows.{form}"
    file.write_bytes(file.read_bytes()[:-8])
    got = _all(tmp_path, Obelics(images="images"))
    assert _rejects(got) == [(f"rows.{form}", "cut_shard", True)]
    assert len(got) == (3 if form == "json" else 1)  # Parquet's index stands at the end


def test_wrong_settings_and_paths(tmp_path):
    with pytest.raises(UserError, match="no such file or folder; expected OBELICS-like rows"):
        Obelics().shards(str(tmp_path / "none"))
    _write(tmp_path, ROWS, "jsonl")
    with pytest.raises(UserError, match=r"Obelics.images='images'.*is not there"):
        Obelics(images="images").shards(str(tmp_path))
    with pytest.raises(UserError, match=r"Obelics.names='names.json': no file"):
        Obelics(names="names.json").shards(str(tmp_path))
    (tmp_path / "names.json").write_text("[]")
    with pytest.raises(UserError, match="holds a list; expected a JSON object, address to name"):
        _all(tmp_path, Obelics(names="names.json"))
