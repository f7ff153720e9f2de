"""Latents on disk: they come back as they were written, and other records are refused."""

import numpy as np
import pytest

from emu_jax.data.latents import EXAMPLES, LatentExample, Latents, write_latents
from emu_jax.data.records import write_records
from emu_jax.errors import UserError


def test_latents_come_back_and_other_records_are_refused(tmp_path):
    rng = np.random.default_rng(0)
    shapes = ((2, 3, 4), (2, 3, 4), (5, 6), (5, 6))
    examples = [LatentExample(f"a/ü{n}", *(rng.normal(size=s).astype(np.float32) for s in shapes)) for n in range(3)]
    write_latents(tmp_path, examples, np.zeros((5, 6), np.float32), {"model": "x"})
    found = Latents(tmp_path)
    assert len(found) == 3 and found.latent_shape == (2, 3, 4) and found.condition_shape == (5, 6)
    for n, example in enumerate(examples):
        assert found[n].key == example.key
        for name in ("mean", "deviation", "condition", "encoded"):
            np.testing.assert_array_equal(getattr(found[n], name), getattr(example, name))
    for foreign in (b"\x05\x00\x00\x00abcdefg", b"", examples[0].record()[:-9]):
        write_records(tmp_path / EXAMPLES, [foreign])
        with pytest.raises(UserError, match=r"examples\.array_record\[0\]: not a record of `emu-jax precompute` \("):
            Latents(tmp_path)[0]
