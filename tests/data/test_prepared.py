"""Prepared folders: records keep what they are given, damage is found and named."""

import json
import random

import numpy as np
import pytest
import tensorflow_datasets as tfds
from hypothesis import given, settings
from hypothesis import strategies as st

from emu_jax.data.document import Text
from emu_jax.data.images import decode_image
from emu_jax.data.prepared import MANIFEST, Record, Records, StoredImage, read_manifest
from emu_jax.errors import UserError
from tests.data.folders import image, pairs, write_folder

TEXTS = st.builds(Text, st.text(max_size=20), st.sampled_from(["", "user", "assistant"]))
IMAGES = st.builds(StoredImage, st.binary(max_size=20), st.none() | st.floats(0, 1, width=32))


@settings(max_examples=100, deadline=None)
@given(st.lists(TEXTS | IMAGES, max_size=6).map(tuple), st.sampled_from(["pair", "web"]))
def test_a_record_is_what_it_was(parts, kind):
    record = Record("a/ü", kind, parts)
    assert Record.parse(record.serialise(), "here") == record


def test_bytes_that_are_no_record():
    whole = Record("key", "pair", (image(0), Text("a cat"))).serialise()
    for data in (b"", b"hello", whole[:-3], whole[: len(whole) // 2]):
        with pytest.raises(
            UserError, match=r"^here: not a record of `emu-jax prepare` \(.+\); prepare the data again$"
        ):
            Record.parse(data, "here")


def test_tensorflow_datasets_reads_the_folder(tmp_path):
    records = pairs("cat", 7)
    folder = write_folder(tmp_path / "cats", records)
    source = tfds.builder_from_directory(folder).as_data_source("train")
    assert len(source) == 7
    found = {example["key"].decode(): example for example in (source[i] for i in range(7))}
    for record in records:
        example = found[record.key]
        assert example["layout"] == b"PT" and example["texts"] == [record.parts[1].text.encode()]
        # Another decoder: the same but for rounding.
        expected = decode_image(record.parts[0].data, record.key).astype(int)
        assert np.abs(example["images"][0].astype(int) - expected).max() <= 2


def test_fifty_cuts_are_found(tmp_path):
    folder = write_folder(tmp_path / "cats", pairs("cat", 40))
    chance = random.Random(0)
    files = sorted(folder.glob("*.array_record-*"))
    whole = {file: file.read_bytes() for file in files}
    for _ in range(50):
        file = chance.choice(files)
        cut = chance.randrange(len(whole[file]))
        file.write_bytes(whole[file][:cut])
        with pytest.raises(UserError, match=f"{file.name}: has {cut:,} bytes, its manifest states"):
            Records(folder, "train")
        file.write_bytes(whole[file])
    assert len(Records(folder, "train")) == 40


def test_changed_bytes_are_found_by_reading_everything(tmp_path):
    folder = write_folder(tmp_path / "cats", pairs("cat", 40))
    file = max(folder.glob("*.array_record-*"))
    whole, chance = file.read_bytes(), random.Random(0)
    Records(folder, "train").verify()
    for _ in range(50):
        place = chance.randrange(len(whole))
        file.write_bytes(whole[:place] + bytes([whole[place] ^ (1 + chance.randrange(255))]) + whole[place + 1 :])
        with pytest.raises(UserError, match=f"{file.name}: damaged, its SHA-256 is not the manifest's"):
            Records(folder, "train").verify()


def test_a_damaged_record_names_its_place(tmp_path):
    folder = write_folder(tmp_path / "cats", pairs("cat", 40), shards=1)
    file = next(folder.glob("*.array_record-*"))
    data = bytearray(file.read_bytes())
    data[4000:4100] = bytes(100)
    file.write_bytes(data)
    records = Records(folder, "train")
    with pytest.raises(UserError, match=rf"^{file}: damaged \(.+\); copy it again or prepare the data again$"):
        for index in range(40):
            records[index]


def test_folders_that_are_not_prepared(tmp_path):
    folder = write_folder(tmp_path / "cats", pairs("cat", 4))
    with pytest.raises(UserError, match=r"cats: no split 'test'; it has train$"):
        Records(folder, "test")
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | {"schema": 99}))
    with pytest.raises(UserError, match=r"manifest\.json: records of schema 99; this version reads 1, prepare"):
        read_manifest(folder)
    (folder / MANIFEST).write_text("[]")
    with pytest.raises(UserError, match=r"manifest\.json: .*; expected a manifest of `emu-jax prepare`"):
        read_manifest(folder)
    (folder / MANIFEST).unlink()
    with pytest.raises(UserError, match=r"cats: no manifest\.json in it; expected a folder that `emu-jax prepare` fin"):
        read_manifest(folder)
