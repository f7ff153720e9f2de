"""Records of files in buckets: the same as those of the files, by few requests, and damage is found."""

import json
import os
import random
import subprocess
import sys
import urllib.request

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from emu_jax import buckets
from emu_jax.data import bucket_records, record_files
from emu_jax.data.bucket_records import BucketReader
from emu_jax.data.config import DataConfig
from emu_jax.data.pipeline import Pipeline
from emu_jax.data.prepared import MANIFEST, Records
from emu_jax.data.record_files import READER, RecordFile, RecordFiles
from emu_jax.data.records import write_records
from emu_jax.data.tokenizer import Tokenizer
from emu_jax.errors import UserError
from tests.buckets import FAULTS, FaultyProxy, free_port, gcs_environment, gcs_server
from tests.data.folders import SIZE, pairs, write_folder


def write(path, sizes: list[int], options: str = "group_size:1") -> list[bytes]:
    """A local file with records of these sizes; returns them."""
    chance = random.Random(0)
    records = [chance.randbytes(size // 2) + b"a" * (size - size // 2) for size in sizes]
    writer = ArrayRecordWriter(str(path), options)
    for record in records:
        writer.write(record)
    writer.close()
    return records


SIZES = {
    "short": [0, 1, 2, 30, 400],
    "across blocks of 64 KiB": [60_000, 90_000, 5, 300_000, 65_536 - 24 - 40, 1_000_000, 7],
    "a footer longer than the first request": [40] * 60_000,
    "none": [],
}


@pytest.mark.parametrize("options", ["group_size:1", "group_size:1,uncompressed"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_a_bucket_gives_what_the_file_holds(tmp_path, bucket, sizes, options):
    expected = write(tmp_path / "local", sizes, options)
    data = (tmp_path / "local").read_bytes()
    (bucket / "file").write_bytes(data)
    reader = BucketReader(bucket / "file", len(data), READER)
    assert reader.num_records() == len(expected)
    order = random.Random(1).sample(range(len(expected)), min(len(expected), 500))
    for first in range(0, len(order), 7):
        piece = order[first : first + 7]
        assert reader.read(piece) == [expected[position] for position in piece]
    assert reader.read(order[:50]) == [expected[position] for position in order[:50]]


def test_s3_gives_what_the_file_holds(tmp_path, s3_bucket):
    expected = write(tmp_path / "local", SIZES["across blocks of 64 KiB"])
    data = (tmp_path / "local").read_bytes()
    (s3_bucket / "file").write_bytes(data)
    reader = BucketReader(s3_bucket / "file", len(data), READER)
    assert reader.read([5, 0, 6, 1]) == [expected[position] for position in (5, 0, 6, 1)]


def test_neighbours_are_one_request(tmp_path, bucket, monkeypatch):
    expected = write(tmp_path / "local", [100] * 40)
    data = (tmp_path / "local").read_bytes()
    (bucket / "file").write_bytes(data)
    reader = BucketReader(bucket / "file", len(data), READER)
    asked = []
    fetch = reader._fetch
    monkeypatch.setattr(reader, "_fetch", lambda ranges: asked.extend(ranges) or fetch(ranges))
    assert reader.read([12, 3, 10, 11, 3]) == [expected[position] for position in (12, 3, 10, 11, 3)]
    assert len(asked) == 2 and sum(stop - start for start, stop in asked) < 1000


def test_damage_is_found_and_its_file_is_named(tmp_path, bucket):
    """60 flips of the records, of the footer and of the last block's two chunks: each changes nothing or is found."""
    expected = write(tmp_path / "local", [400] * 60)
    data = (tmp_path / "local").read_bytes()
    (bucket / "whole").write_bytes(data)
    footer = BucketReader(bucket / "whole", len(data), READER)._offsets[-1]
    last = len(data) - bucket_records.BLOCK
    spans = [(64, footer), (footer, footer + 200), (last, last + 100)]
    chance, found = random.Random(0), 0
    for number in range(60):
        place = chance.randrange(*spans[number % 3])
        path = bucket / str(number)
        path.write_bytes(data[:place] + bytes([data[place] ^ (1 << chance.randrange(8))]) + data[place + 1 :])
        records = RecordFiles([RecordFile(path, 60, len(data))])
        try:
            assert records.read(range(60)) == expected
        except UserError as error:
            assert str(error).startswith(f"{path}: damaged (")
            found += 1
    assert found > 45


def test_files_that_are_cut_or_gone(tmp_path, bucket):
    write(tmp_path / "local", [400] * 10)
    data = (tmp_path / "local").read_bytes()
    (bucket / "cut").write_bytes(data[:-500])
    (bucket / "other").write_bytes(b"not an ArrayRecord file" * 10_000)
    for name in ("cut", "other", "gone"):
        with pytest.raises(
            UserError, match=rf"^{bucket / name}: damaged \(.+\); copy it again or prepare the data again$"
        ):
            RecordFiles([RecordFile(bucket / name, 10, len(data))]).read([1])


def test_what_was_fetched_is_dropped_in_time(tmp_path, bucket, monkeypatch):
    monkeypatch.setattr(record_files, "HELD_BYTES", 5000)
    expected = write(tmp_path / "local", [1000] * 4)
    data = (tmp_path / "local").read_bytes()
    files = []
    for number in range(10):
        (bucket / str(number)).write_bytes(data)
        files.append(RecordFile(bucket / str(number), 4, len(data)))
    opened = record_files._OpenFiles(most=100)
    for number in (*range(10), *range(10)):
        assert opened.read(files[number], [2]) == [expected[2]]
    assert len(opened._readers) == 5 and opened._held.total() == 5000


def test_a_prepared_folder_in_a_bucket(tmp_path, bucket):
    local = write_folder(tmp_path / "cats", pairs("cat", 30))
    for file in local.iterdir():
        (bucket / "cats" / file.name).write_bytes(file.read_bytes())
    here, there = Records(local, "train"), Records(bucket / "cats", "train")
    assert there.fingerprint == here.fingerprint and there.read(range(30)) == here.read(range(30))
    there.verify()
    names = sorted(json.loads((local / MANIFEST).read_text())["splits"]["train"]["files"])
    whole = (bucket / "cats" / names[0]).read_bytes()
    (bucket / "cats" / names[0]).write_bytes(whole[:-1])
    with pytest.raises(
        UserError, match=rf"^{bucket}/cats/{names[0]}: has {len(whole) - 1:,} bytes, its manifest states"
    ):
        Records(bucket / "cats", "train")
    (bucket / "cats" / names[0]).unlink()
    with pytest.raises(UserError, match=rf"^{bucket}/cats/{names[0]}: is missing, its manifest states"):
        Records(bucket / "cats", "train")


READ = """
import sys
from emu_jax import buckets
from emu_jax.data.record_files import RecordFile, RecordFiles
from emu_jax.storage import as_path
records = RecordFiles([RecordFile(as_path(sys.argv[1]), 200, int(sys.argv[2]))])
order = [index * 77 % 200 for index in range(200)]
for first in range(0, 200, 50):
    assert records.read(order[first : first + 50]) == [b"%d" % index * 100 for index in order[first : first + 50]]
print(buckets.retries())
"""


@pytest.mark.long
@pytest.mark.parametrize("share, faults", [(0.3, FAULTS), (1.0, ("503", "reset"))])
def test_a_faulty_network_is_no_damage(tmp_path, share, faults):
    (tmp_path / "bucket").mkdir()
    port = free_port()
    write_records(tmp_path / "local", [b"%d" % index * 100 for index in range(200)])
    data = (tmp_path / "local").read_bytes()
    with FaultyProxy(port, 0.0, faults=faults, delay=0.05) as proxy, gcs_server(tmp_path, proxy.url, port):
        variables = gcs_environment(proxy.url)
        upload = f"{proxy.url}/upload/storage/v1/b/bucket/o?uploadType=media&name=file"
        urllib.request.urlopen(urllib.request.Request(upload, data, method="POST")).close()
        proxy.share = share
        program = [sys.executable, "-c", READ, "gs://bucket/file", str(len(data))]
        child = os.environ | variables | ({buckets.TIMEOUT: "2"} if share == 1 else {})
        done = subprocess.run(program, env=child, capture_output=True, text=True)
    if share == 1:
        last = done.stderr.splitlines()[-1]
        assert "TransientError: GET" in last and "bucket/o/file" in last and "storage does not answer for" in last, last
    else:
        assert done.returncode == 0, done.stderr[-2000:]
        assert int(done.stdout) > 5


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_stream_from_a_bucket_is_that_of_the_folder(tmp_path, bucket, workers):
    local = write_folder(tmp_path / "cats", pairs("cat", 60))
    for file in local.iterdir():
        (bucket / "cats" / file.name).write_bytes(file.read_bytes())
    texts = [part.text for record in pairs("cat", 60) for part in record.parts[1:]]
    proto = Tokenizer.train(texts, vocab_size=200, model_type="word").proto
    (bucket / "tokenizer.model").write_bytes(proto)
    tokenizer = Tokenizer.load(str(bucket / "tokenizer.model"))
    fields = {"split": "train", "seed": 0, "row_tokens": 32, "row_images": 2, "batch_rows": 2, "packing_window": 8}
    streams = [
        Pipeline(
            DataConfig.from_dict(fields | {"source": str(folder), "pairs": {}, "workers": workers}),
            tokenizer,
            queries=2,
            image_size=SIZE,
        )
        for folder in (local, bucket / "cats")
    ]
    for _ in range(20):
        expected, found = map(next, streams)
        assert all(np.array_equal(found[name], expected[name]) for name in expected)
    states = [stream.get_state() for stream in streams]
    assert states[0]["fingerprint"] == states[1]["fingerprint"]
    assert states[0]["shards"]["0"]["iterator"] == states[1]["shards"]["0"]["iterator"]
    for stream in streams:
        stream.close()
