"""Latents on disk: they come back as they were written, by whomever, and other records are refused."""

import dataclasses
import json
import os

import ml_dtypes
import numpy as np
import pytest

from emu_jax.data.latents import EXAMPLES, LatentExample, Latents, LatentsFolder
from emu_jax.data.records import write_records
from emu_jax.errors import UserError
from tests.data.folders import write_latents

SHAPES = ((2, 3, 4), (2, 3, 4), (5, 6), (5, 6))
ARRAYS = ("mean", "deviation", "condition", "encoded")


def some(count: int) -> list[LatentExample]:
    rng = np.random.default_rng(0)
    return [LatentExample(f"a/ü{n}", *(rng.normal(size=s).astype(np.float32) for s in SHAPES)) for n in range(count)]


def test_latents_come_back_and_other_records_are_refused(tmp_path):
    examples = some(3)
    assert write_latents(tmp_path / "a", [examples], model="x") == 3
    found = Latents(tmp_path / "a")
    assert len(found) == 3 and found.latent_shape == (2, 3, 4) and found.condition_shape == (5, 6)
    assert found.index["model"] == "x"
    for n, example in enumerate(examples):
        assert found[n].key == example.key
        for name in ARRAYS:
            np.testing.assert_array_equal(getattr(found[n], name), getattr(example, name))
    for foreign in (b"\x05\x00\x00\x00abcdefg", b"", examples[0].record(np.dtype(np.float32))[:-9]):
        folder = tmp_path / str(len(foreign))
        write_latents(folder, [examples[:1]])
        write_records(folder / f"{EXAMPLES}-00000", [foreign])
        with pytest.raises(
            UserError, match=r"examples\.array_record-00000\[0\]: not a record of `emu-jax precompute` \("
        ):
            Latents(folder)[0]


@pytest.mark.parametrize("kind", ["tmp_path", "bucket"])
def test_each_chunk_is_a_file_unless_it_is_empty(kind, request):
    folder = request.getfixturevalue(kind) / "latents"
    assert write_latents(folder, [some(5)[:2], [], some(5)[2:]]) == 5
    found = Latents(folder)
    assert [entry["records"] for entry in found.index["files"].values()] == [2, 3]
    drawn = [(index, np.random.default_rng(index)) for index in (4, 0, 3)]
    for example, expected in zip(found.examples(drawn), (some(5)[index] for index in (4, 0, 3)), strict=True):
        np.testing.assert_array_equal(example["condition"], expected.condition)
    assert {path.name for path in folder.iterdir()} == {*found.index["files"], "index.json", "unconditional.npy"}


def test_bfloat16_without_the_images_own_embeddings_takes_less_than_half(tmp_path):
    examples = some(4)
    write_latents(tmp_path / "all", [examples])
    less = [dataclasses.replace(example, encoded=None) for example in examples]
    write_latents(tmp_path / "less", [less], "bfloat16")
    sizes = [len(examples[0].record(np.dtype(np.float32)))]
    sizes += [len(less[0].record(np.dtype(ml_dtypes.bfloat16)))]
    assert sizes[0] > 2 * sizes[1], sizes
    found = Latents(tmp_path / "less")
    expected = examples[2].condition.astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(found[2].condition, expected)
    assert found[2].encoded is None and set(found.examples([(2, np.random.default_rng(0))])[0]) == {
        "latents",
        "condition",
    }
    assert "encoded" not in Latents(tmp_path / "all", encoded=False).examples([(2, np.random.default_rng(0))])[0]
    with pytest.raises(UserError, match=r"holds no embeddings of the images themselves; set config\.loss\.encoded_sh"):
        Latents(tmp_path / "less", encoded=True)


def test_parts_in_any_order_are_the_same_files(tmp_path):
    chunks = [some(7)[:3], some(7)[3:4], some(7)[4:]]
    write_latents(tmp_path / "whole", chunks, model="x")
    unconditional = np.ones((5, 6), np.float32)
    for part in ((1, 2), (0, 2)):  # each is a process of its own
        writer = LatentsFolder(tmp_path / "parts", 3, "float32", {"model": "x"})
        assert not (tmp_path / "parts" / "index.json").exists()
        for number in reversed(writer.missing(part)):
            writer.write(number, chunks[number])
        assert writer.finish(unconditional) == (None if part == (1, 2) else 7)
    files = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "parts").iterdir()} == files
    assert LatentsFolder(tmp_path / "parts", 3, "float32", {"model": "x"}).finish(unconditional) == 7, "done already"


def test_what_is_missing_is_said(tmp_path):
    writer = LatentsFolder(tmp_path, 2, "float32", {"model": "x"})
    writer.write(0, some(1))
    assert writer.missing() == [1] and writer.finish(np.ones((5, 6))) is None
    with pytest.raises(UserError, match=r"no index\.json in it; .*, which the same command finishes: some parts of it"):
        Latents(tmp_path)
    with pytest.raises(
        UserError, match="holds examples of other settings: model is 'x' there and 'y' here; name another"
    ):
        LatentsFolder(tmp_path, 2, "float32", {"model": "y"})
    with pytest.raises(UserError, match="dtype is 'float32' there and 'bfloat16' here"):
        LatentsFolder(tmp_path, 2, "bfloat16", {"model": "x"})


def test_no_examples_at_all(tmp_path):
    with pytest.raises(UserError, match="no image of the source became an example"):
        write_latents(tmp_path, [[], []])


def test_another_process_may_finish_meanwhile(tmp_path, monkeypatch):
    """Between this one's look at the chunks and its reading of them, the folder is completed and tidied."""
    writer = LatentsFolder(tmp_path, 1, "float32", {})
    writer.write(0, some(2))
    other = LatentsFolder(tmp_path, 1, "float32", {})
    missing = writer.missing

    def then_the_other(part=(0, 1)):
        found = missing(part)
        other.finish(np.ones((5, 6), np.float32))
        return found

    monkeypatch.setattr(writer, "missing", then_the_other)
    assert writer.finish(np.ones((5, 6), np.float32)) == 2
    assert json.loads((tmp_path / "index.json").read_text())["examples"] == 2
    assert sorted(os.listdir(tmp_path)) == ["examples.array_record-00000", "index.json", "unconditional.npy"]
