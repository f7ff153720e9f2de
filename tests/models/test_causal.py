"""The Causal Transformer: T5's buckets, and causality of the queries."""

import jax
import jax.numpy as jnp
import numpy as np

from configs import models
from emu_jax.models import emu
from emu_jax.models.causal import relative_buckets

CONFIG = emu.EmuConfig.from_dict(models.debug())


def test_relative_buckets_are_exact_then_logarithmic():
    expected = [[0, 0, 0, 0, 0], [1, 0, 0, 0, 0], [2, 1, 0, 0, 0], [2, 2, 1, 0, 0], [3, 2, 2, 1, 0]]
    np.testing.assert_array_equal(relative_buckets(5, buckets=4, max_distance=8), expected)


def test_distant_keys_share_the_last_bucket():
    buckets = relative_buckets(200, buckets=32, max_distance=128)
    assert buckets.max() == 31
    assert (buckets[199, :72] == 31).all(), "distances of 128 and more"


def test_a_query_sees_no_later_query():
    """Replacing query 2 of 4 leaves the embeddings of queries 0 and 1 as they were."""
    params = emu.init(CONFIG, jax.random.key(0))
    features = jax.random.normal(jax.random.key(1), (1, CONFIG.vision.patches + 1, CONFIG.vision.width))
    before = emu.bind(CONFIG, params).causal(features)
    params["causal"]["queries"] = params["causal"]["queries"].at[2].add(1.0)
    after = emu.bind(CONFIG, params).causal(features)
    np.testing.assert_array_equal(before[:, :2], after[:, :2])
    assert (jnp.abs(before[:, 2:] - after[:, 2:]).max(-1) > 1e-4).all()
