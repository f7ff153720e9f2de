"""`prepare` from a bucket into a bucket: the bytes of local folders, for any number of workers."""

import io
import json
import tarfile

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from emu_jax import cli
from emu_jax.data.prepare import make_folder
from emu_jax.data.prepared import Records
from emu_jax.data.raw.readers import make_reader
from emu_jax.errors import UserError
from emu_jax.storage import Path, as_path

SHARDS, SAMPLES = 3, 8


def jpeg(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (70, 60, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def write_pairs(folder: Path) -> None:
    """img2dataset's layout: tars in folders, each with its counts."""
    for shard in range(SHARDS):
        data = io.BytesIO()
        with tarfile.open(fileobj=data, mode="w") as archive:
            for number in range(SAMPLES):
                for name, member in (("jpg", jpeg(SAMPLES * shard + number)), ("txt", f"image {number}".encode())):
                    info = tarfile.TarInfo(f"{shard}{number:04d}.{name}")
                    info.size = len(member)
                    archive.addfile(info, io.BytesIO(member))
        here = folder / f"part{shard % 2}"
        if not isinstance(here, type(as_path("gs://b/x"))):
            here.mkdir(parents=True, exist_ok=True)
        (here / f"{shard:05d}.tar").write_bytes(data.getvalue())
        (here / f"{shard:05d}_stats.json").write_text(json.dumps({"successes": SAMPLES + (shard == 2)}))


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_bucket_holds_what_a_folder_holds(tmp_path, bucket, workers):
    local = tmp_path / "raw"
    write_pairs(local)
    write_pairs(bucket / "raw")
    words = ("--shards", "2", "--image-size", "32", "--name", "set", "--max-faults", "0.1")
    assert cli.main(["prepare", "pairs", "--in", str(local), "--out", str(tmp_path / "out"), *words]) == 0
    out = bucket / "out"
    more = ("--workers", str(workers))
    assert cli.main(["prepare", "pairs", "--in", str(bucket / "raw"), "--out", str(out), *words, *more]) == 0
    assert contents(out) == contents(tmp_path / "out")
    rejects = json.loads(contents(out)["manifest.json"])["rejects"]
    assert rejects == {"count_differs": {"rejects": 1, "documents": 0}}, "img2dataset's counts are read too"
    assert len(Records(out, "train")) == SHARDS * SAMPLES


def test_rows_of_parquet_and_jsonl(tmp_path, bucket, s3_bucket):
    table = pyarrow.table({"jpg": [jpeg(0), jpeg(1)], "caption": ["a", "b"]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    (bucket / "a.parquet").write_bytes((tmp_path / "a.parquet").read_bytes())
    found, expected = (
        [document for shard in reader.shards(str(path)) for document in reader.read(shard)]
        for reader in (make_reader("pairs"),)
        for path in (bucket / "a.parquet", tmp_path / "a.parquet")
    )
    assert found == expected and [document.key for document in found] == ["a.parquet/000000000", "a.parquet/000000001"]
    (s3_bucket / "rows" / "a.jsonl").write_bytes(b'{"images": [null], "texts": ["a page"]}\n')
    reader = make_reader("obelics")
    (shard,) = reader.shards(str(s3_bucket / "rows"))
    assert shard == f"{s3_bucket}/rows//a.jsonl"
    assert [document.key for document in reader.read(shard)] == ["a.jsonl/0"]


def test_a_folder_of_datasets(bucket, tmp_path):
    """Arrow, by its state.json; as from a local disk."""
    table = pyarrow.table({"image": [jpeg(0), jpeg(1)], "text": ["a", "b"]})
    with pyarrow.ipc.new_stream(str(tmp_path / "data.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=1)
    (tmp_path / "state.json").write_text('{"_data_files": [{"filename": "data.arrow"}]}')
    (tmp_path / "cache-1.arrow").write_bytes(b"not read")
    for name in ("data.arrow", "state.json", "cache-1.arrow"):
        (bucket / "set" / name).write_bytes((tmp_path / name).read_bytes())
    reader = make_reader("pairs")
    (shard,) = reader.shards(str(bucket / "set"))
    assert shard == f"{bucket}/set//data.arrow"
    (local,) = reader.shards(str(tmp_path))
    assert list(reader.read(shard)) == list(reader.read(local)) and len(list(reader.read(local))) == 2


def test_a_preparation_that_stopped_is_begun_anew(bucket):
    (bucket / "out" / "begun.partial").write_bytes(b"")
    (bucket / "out" / "stale").write_bytes(b"half")
    make_folder(bucket / "out")
    assert list(contents(bucket / "out")) == ["begun.partial"]
    make_folder(bucket / "new")
    (bucket / "out" / "manifest.json").write_bytes(b"{}")
    with pytest.raises(UserError, match=rf"^{bucket}/out: it holds prepared data; name a new folder"):
        make_folder(bucket / "out")
    (bucket / "other" / "file").write_bytes(b"")
    with pytest.raises(UserError, match=rf"^{bucket}/other: it holds file; name a new folder"):
        make_folder(bucket / "other")


@pytest.mark.parametrize("reader", ["mmc4", "coco", "chats", "html", "storyboards", "videos", "videochat"])
def test_formats_with_files_beside_each_other_are_local(reader, capsys, bucket):
    assert cli.main(["prepare", reader, "--in", "gs://bucket/raw", "--out", str(bucket / "out")]) == 2
    line = (
        "gs://bucket/raw: raw data in this format, with files beside each other, is on a local disk; name a local path"
    )
    assert line in capsys.readouterr().err
    assert not (bucket / "out").exists()
