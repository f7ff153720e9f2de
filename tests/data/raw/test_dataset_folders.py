"""Folders of Hugging Face's datasets, in the layout that it writes: which files are read, and what becomes of rows."""

import importlib.util
import io
import json
import os

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image as PIL
from pyarrow import parquet

from emu_jax.data.document import Text
from emu_jax.data.raw.dataset_folders import data_names
from emu_jax.data.raw.files import find_shards
from emu_jax.data.raw.limits import read_first
from emu_jax.data.raw.reader import RawDocument, RawImage, Reject
from emu_jax.data.raw.readers import make_reader
from emu_jax.data.system_messages import IMAGE_SYSTEM
from emu_jax.errors import UserError

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
TURN = pa.struct([("from", pa.string()), ("value", pa.string())])
SCHEMA = pa.schema([("image", IMAGE), ("text", pa.string()), ("conversations", pa.list_(TURN))])


def _png(number: int) -> bytes:
    buffer = io.BytesIO()
    PIL.fromarray(np.full((40, 40, 3), number, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def _rows(count: int, start: int = 0) -> list[dict]:
    return [
        {
            "image": {"bytes": _png(n), "path": f"{n}.png"},
            "text": f"text {n}",
            "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": f"{n}"}],
        }
        for n in range(start, start + count)
    ]


def _table(rows: list[dict], schema: pa.Schema = SCHEMA) -> pa.Table:
    return pa.Table.from_pylist(rows, schema)


def _arrow(path, table: pa.Table, batch: int = 2, file: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with (pa.ipc.new_file if file else pa.ipc.new_stream)(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=batch)


def _saved(folder, shards: int = 2, rows: int = 3, start: int = 0) -> list[str]:
    """A folder as `Dataset.save_to_disk` leaves it."""
    names = [f"data-{n:05d}-of-{shards:05d}.arrow" for n in range(shards)]
    for n, name in enumerate(names):
        _arrow(folder / name, _table(_rows(rows, start + n * rows)))
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "5d43", "_split": None}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text('{"features": {}}')
    return names


def _read(source: str, path, *settings: str):
    reader = make_reader(source, settings)
    found = [item for shard in reader.shards(str(path)) for item in reader.read(shard)]
    return [f for f in found if isinstance(f, RawDocument)], [f for f in found if isinstance(f, Reject)]


def _pairs(path, *settings: str) -> list[str]:
    documents, rejects = _read("pairs", path, *settings)
    assert not rejects, rejects
    return [document.parts[1].text for document in documents]


# ---------------------------------------------------------------- folders


def test_a_saved_folder_as_pairs_and_as_chats(tmp_path):
    _saved(tmp_path)
    _arrow(tmp_path / "cache-4f.arrow", _table(_rows(1, 90)))  # of `map`
    documents, rejects = _read("pairs", tmp_path)
    assert not rejects and [document.key for document in documents] == [
        f"data-0000{n}-of-00002.arrow/{row:09d}" for n in range(2) for row in range(3)
    ]
    assert [document.parts for document in documents] == [(RawImage(_png(n)), Text(f"text {n}")) for n in range(6)]
    documents, rejects = _read("chats", tmp_path)
    assert not rejects and documents[5].parts == (
        Text(IMAGE_SYSTEM, "system"),
        RawImage(_png(5)),
        Text("What?", "user"),
        Text("5", "assistant"),
    )


def test_splits_are_not_mixed(tmp_path):
    for n, split in enumerate(("train", "test")):
        _saved(tmp_path / "all" / split, 1, 1, n)
    (tmp_path / "all" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    for source in ("pairs", "chats"):
        for path in (tmp_path, tmp_path / "all"):
            with pytest.raises(UserError, match=r"all: holds the splits test, train; name one, as --in .*/all/test$"):
                make_reader(source).shards(str(path))
    assert _pairs(tmp_path / "all" / "train") == ["text 0"]
    assert _pairs(f"{tmp_path}/all/t*/*.arrow") == ["text 1", "text 0"], "a glob says what is wanted"


def test_splits_of_the_hub_are_not_mixed(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    names = ["train-00000-of-00002.parquet", "train-00001-of-00002-4f1a.parquet", "test-00000-of-00001.parquet"]
    for name in names:
        (folder / name).write_bytes(b"")
    with pytest.raises(UserError) as caught:
        find_shards(str(tmp_path), ["*.parquet"], "Parquet")
    expected = f"{folder}: holds the splits test, train; name the files of one, as --in '{folder}/test-*.parquet'"
    assert str(caught.value) == expected
    found = find_shards(f"{folder}/train-*.parquet", ["*.parquet"], "Parquet")
    assert found == [f"{folder}//{name}" for name in names[:2]]
    (folder / names[2]).rename(folder / "laion-test-of-faith.parquet")  # a name that only looks like a split
    assert len(find_shards(str(tmp_path), ["*.parquet"], "Parquet")) == 3


def test_a_cached_folder(tmp_path):
    for n, name in enumerate(("set-test.arrow", "set-train-00000-of-00002.arrow", "set-train-00001-of-00002.arrow")):
        _arrow(tmp_path / name, _table(_rows(1, n)))
    (tmp_path / "cache-9.arrow").write_bytes(b"of map")
    info = {"splits": {"train": {}, "test": {}}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    with pytest.raises(UserError, match=r"holds the splits test, train; name the files of one, as --in '.*/set-test\*"):
        make_reader("pairs").shards(str(tmp_path))
    assert _pairs(f"{tmp_path}/set-train*.arrow") == ["text 1", "text 2"]
    (tmp_path / "set-test.arrow").unlink()
    assert _pairs(tmp_path) == ["text 1", "text 2"]


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"_data_files": [{"filename": "gone.arrow"}]}, r"state\.json: it names gone\.arrow, which is not there; copy"),
        ({"_indices_data_files": [{"filename": "indices.arrow"}]}, r"state\.json: the folder is a selection of rows"),
        ("{", r"state\.json: .*; expected a file of Hugging Face's datasets|state\.json"),
    ],
)
def test_folders_that_cannot_be_read(tmp_path, state, message):
    _saved(tmp_path)
    (tmp_path / "state.json").write_text(state if isinstance(state, str) else json.dumps(state))
    with pytest.raises(UserError, match=message):
        make_reader("pairs").shards(str(tmp_path))


def test_json_files_without_arrow_stay(tmp_path):
    names = ["a/dataset_info.json", "a/state.json", "b/x.json"]
    assert data_names(tmp_path, names) == names


# ---------------------------------------------------------------- files


def test_every_cut_of_a_stream_is_told(tmp_path):
    _arrow(tmp_path / "a.arrow", _table(_rows(4)))
    data = (tmp_path / "a.arrow").read_bytes()
    for length in [*range(0, len(data), 97), *range(len(data) - 20, len(data))]:
        (tmp_path / "a.arrow").write_bytes(data[:length])
        *documents, reject = make_reader("pairs").read(str(tmp_path / "a.arrow"))
        assert (reject.key, reject.reason) == ("a.arrow", "cut_shard"), length
        assert [document.parts[1].text for document in documents] == [f"text {n}" for n in range(len(documents))]


def test_bytes_that_are_flipped_end_nothing(tmp_path):
    """Each is read, or told; none ends the process, as offsets that lead out of a column could."""
    _arrow(tmp_path / "a.arrow", _table(_rows(4)))
    data = (tmp_path / "a.arrow").read_bytes()
    rng = np.random.default_rng(0)
    for source in ("pairs", "chats"):
        reader = make_reader(source)
        for place in rng.integers(0, len(data), 150):
            flipped = bytearray(data)
            flipped[place] ^= 1 << int(rng.integers(8))
            (tmp_path / "a.arrow").write_bytes(flipped)
            assert all(isinstance(f, RawDocument | Reject) for f in reader.read(str(tmp_path / "a.arrow")))


def test_the_file_format_and_a_text_that_is_not_utf8(tmp_path):
    table = _table(_rows(3))
    raw = pa.array([b"text 0", b"caf\xe9", b"text 2"])
    table = table.set_column(1, "text", pa.chunked_array([raw.view(pa.string())]))
    _arrow(tmp_path / "a.arrow", table, file=True)
    documents, (reject,) = _read("pairs", tmp_path)
    assert len(documents) == 2 and (reject.key, reject.reason) == ("a.arrow/000000001", "unreadable_text")


def test_a_large_batch_is_read_a_few_rows_at_a_time(tmp_path):
    """Of 60 MB in one batch, the first row takes none of it."""
    schema = pa.schema([("image", pa.binary()), ("text", pa.string())])
    rows = [{"image": bytes(1 << 20), "text": "a"} for _ in range(60)]
    _arrow(tmp_path / "a.arrow", pa.Table.from_pylist(rows, schema), batch=60)
    reader = make_reader("pairs")
    before = pa.total_allocated_bytes()
    (first,) = read_first(reader, reader.shards(str(tmp_path)), 1)
    assert len(first.parts[0].data) == 1 << 20 and pa.total_allocated_bytes() - before < 8 << 20


# ---------------------------------------------------------------- nested columns


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_nested_columns(tmp_path, suffix):
    part = pa.struct([("type", pa.string()), ("text", pa.string()), ("index", pa.int64())])
    message = pa.struct([("role", pa.string()), ("content", pa.list_(part)), ("weight", pa.int64())])
    schema = pa.schema(
        [
            ("images", pa.list_(IMAGE)),
            ("messages", pa.list_(message)),
            ("meta", pa.struct([("caption", pa.string())])),
        ]
    )
    asked = [{"type": "text", "text": "What?"}, {"type": "image", "index": 0}]
    answered = [{"type": "text", "text": "A cat."}]
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    image = {"bytes": _png(1), "path": None}
    rows = [
        {"images": [image], "messages": messages, "meta": {"caption": "a cat"}},
        {"images": [{"bytes": None, "path": "b.png"}], "messages": messages, "meta": None},
        {"images": [image, image], "messages": messages, "meta": {"caption": "two"}},
        {"images": None, "messages": [], "meta": {"caption": "none"}},
    ]
    (tmp_path / "b.png").write_bytes(_png(2))
    table = pa.Table.from_pylist(rows, schema)
    _arrow(tmp_path / "a.arrow", table) if suffix == "arrow" else parquet.write_table(table, tmp_path / "a.parquet")
    documents, rejects = _read("chats", tmp_path)
    assert [document.parts[1:] for document in documents] == [
        (Text("What?", "user"), RawImage(_png(n)), Text("", "user"), Text("A cat.", "assistant")) for n in (1, 2)
    ]
    assert [(r.key, r.reason) for r in rejects] == [
        (f"a.{suffix}/000000002", "images_differ"),
        (f"a.{suffix}/000000003", "no_turns"),
    ]
    documents, rejects = _read("pairs", tmp_path, "images=images", "caption=meta.caption")
    assert [document.parts for document in documents] == [(RawImage(_png(1)), Text("a cat"))]
    assert [r.reason for r in rejects] == ["no_image", "unread_field", "no_image"]
    with pytest.raises(UserError, match=r"columns images, messages, meta; expected an image's bytes in one of jpg"):
        make_reader("pairs", ["caption=meta.caption"]).shards(str(tmp_path))


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("datasets"), reason="pip install datasets")
def test_folders_that_the_real_package_writes(tmp_path, monkeypatch):
    monkeypatch.setitem(os.environ, "HF_HUB_OFFLINE", "1")
    import datasets

    features = datasets.Features(
        image=datasets.Image(),
        text=datasets.Value("string"),
        conversations=[{"from": datasets.Value("string"), "value": datasets.Value("string")}],
    )
    rows = _rows(6)
    whole = datasets.Dataset.from_dict({name: [row[name] for row in rows] for name in rows[0]}, features=features)
    texts = [f"text {n}" for n in range(6)]
    whole.save_to_disk(str(tmp_path / "one"), num_shards=2)
    datasets.DatasetDict(train=whole, test=whole.select([3, 1])).save_to_disk(str(tmp_path / "all"))
    assert _pairs(tmp_path / "one") == _pairs(tmp_path / "all" / "train") == texts
    assert _pairs(tmp_path / "all" / "test") == ["text 3", "text 1"]
    assert len(_read("chats", tmp_path / "one")[0]) == 6
    with pytest.raises(UserError, match="holds the splits test, train"):
        make_reader("pairs").shards(str(tmp_path / "all"))
    cached = datasets.Dataset.from_generator(lambda: iter(rows), features=features, cache_dir=str(tmp_path / "cache"))
    cached.map(lambda row: {"text": row["text"].upper()})
    assert _pairs(tmp_path / "cache") == texts
    reloaded = datasets.load_from_disk(str(tmp_path / "one"))
    reloaded.map(lambda row: {"text": row["text"].upper()})
    assert _pairs(tmp_path / "one") == texts, "what map caches beside the data is not read"
