"""Latents on disk: they come back as they were written, and other records are refused."""

import numpy as np
import pytest

from emu_jax.data import latents
from emu_jax.data.latents import EXAMPLES, LatentExample, Latents, write_latents
from emu_jax.data.records import write_records
from emu_jax.errors import UserError


def some(count: int) -> list[LatentExample]:
    rng = np.random.default_rng(0)
    shapes = ((2, 3, 4), (2, 3, 4), (5, 6), (5, 6))
    return [LatentExample(f"a/ü{n}", *(rng.normal(size=s).astype(np.float32) for s in shapes)) for n in range(count)]


def test_latents_come_back_and_other_records_are_refused(tmp_path):
    examples = some(3)
    assert write_latents(tmp_path, examples, np.zeros((5, 6), np.float32), {"model": "x"}) == 3
    found = Latents(tmp_path)
    assert len(found) == 3 and found.latent_shape == (2, 3, 4) and found.condition_shape == (5, 6)
    for n, example in enumerate(examples):
        assert found[n].key == example.key
        for name in ("mean", "deviation", "condition", "encoded"):
            np.testing.assert_array_equal(getattr(found[n], name), getattr(example, name))
    for foreign in (b"\x05\x00\x00\x00abcdefg", b"", examples[0].record()[:-9]):
        folder = tmp_path / str(len(foreign))
        write_latents(folder, examples[:1], np.zeros((5, 6), np.float32), {})
        write_records(folder / f"{EXAMPLES}-00000", [foreign])
        with pytest.raises(
            UserError, match=r"examples\.array_record-00000\[0\]: not a record of `emu-jax precompute` \("
        ):
            Latents(folder)[0]


@pytest.mark.parametrize("kind", ["tmp_path", "bucket"])
def test_many_latents_are_in_several_files(kind, request, monkeypatch):
    folder = request.getfixturevalue(kind) / "latents"
    monkeypatch.setattr(latents, "FILE_BYTES", 2 * len(some(1)[0].record()))
    unconditional = np.ones((5, 6), np.float32)
    assert write_latents(folder, (example for example in some(5)), unconditional, {}) == 5
    found = Latents(folder)
    assert [entry["records"] for entry in found.index["files"].values()] == [2, 2, 1]
    np.testing.assert_array_equal(found.unconditional, unconditional)
    drawn = [(index, np.random.default_rng(index)) for index in (4, 0, 3)]
    for example, expected in zip(found.examples(drawn), (some(5)[index] for index in (4, 0, 3)), strict=True):
        np.testing.assert_array_equal(example["condition"], expected.condition)
    assert {path.name for path in folder.iterdir()} == {*found.index["files"], "index.json", "unconditional.npy"}
