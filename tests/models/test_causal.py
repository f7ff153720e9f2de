"""The Causal Transformer: T5's buckets, and causality of the queries; bidirectional queries, and pooled patches."""

import dataclasses

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from configs import models
from emu_jax.errors import UserError
from emu_jax.models import emu
from emu_jax.models.causal import KINDS, CausalConfig, PooledPatches, pooling, relative_buckets
from emu_jax.models.flops import forward_flops

CONFIG = emu.EmuConfig.from_dict(models.debug())


def of_kind(kind: str, **sizes) -> emu.EmuConfig:
    return dataclasses.replace(CONFIG, causal=dataclasses.replace(CONFIG.causal, kind=kind, **sizes))


def features_of(config: emu.EmuConfig) -> jax.Array:
    return jax.random.normal(jax.random.key(1), (1, config.vision.patches + 1, config.vision.width))


def test_relative_buckets_are_exact_then_logarithmic():
    expected = [[0, 0, 0, 0, 0], [1, 0, 0, 0, 0], [2, 1, 0, 0, 0], [2, 2, 1, 0, 0], [3, 2, 2, 1, 0]]
    np.testing.assert_array_equal(relative_buckets(5, buckets=4, max_distance=8), expected)


def test_distant_keys_share_the_last_bucket():
    buckets = relative_buckets(200, buckets=32, max_distance=128)
    assert buckets.max() == 31
    assert (buckets[199, :72] == 31).all(), "distances of 128 and more"


def test_a_query_sees_no_later_query():
    """Replacing query 2 of 4 does not change the embeddings of queries 0 and 1."""
    params = emu.init(CONFIG, jax.random.key(0))
    features = jax.random.normal(jax.random.key(1), (1, CONFIG.vision.patches + 1, CONFIG.vision.width))
    before = emu.bind(CONFIG, params).causal(features)
    params["causal"]["queries"] = params["causal"]["queries"].at[2].add(1.0)
    after = emu.bind(CONFIG, params).causal(features)
    np.testing.assert_array_equal(before[:, :2], after[:, :2])
    assert (jnp.abs(before[:, 2:] - after[:, 2:]).max(-1) > 1e-4).all()


def test_buckets_of_both_directions():
    expected = [[0, 5, 6, 6], [1, 0, 5, 6], [2, 1, 0, 5], [2, 2, 1, 0]]
    np.testing.assert_array_equal(relative_buckets(4, buckets=8, max_distance=8, bidirectional=True), expected)


def test_bidirectional_queries_see_later_ones():
    """Replacing query 2 of 4 changes the embeddings of all four; the parameters have the shapes of the causal model."""
    config = of_kind("bidirectional")
    params = emu.init(config, jax.random.key(0))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, emu.abstract(CONFIG))
    before = emu.bind(config, params).causal(features_of(config))
    params["causal"]["queries"] = params["causal"]["queries"].at[2].add(1.0)
    after = emu.bind(config, params).causal(features_of(config))
    changed = np.abs(before - after).max(-1)[0] > 1e-4
    assert changed.tolist() == [True, True, True, True]


@pytest.mark.parametrize(
    ("queries", "side", "expected"),
    [
        (1, 2, [[1, 1, 1, 1]]),
        (2, 2, [[2, 0, 2, 0], [0, 2, 0, 2]]),  # tall cells
        (3, 2, [[2, 2, 0, 0], [0, 2, 2, 0], [0, 0, 2, 2]]),  # no cells: the sequence is cut, patches are shared
        (4, 2, [[4, 0, 0, 0], [0, 4, 0, 0], [0, 0, 4, 0], [0, 0, 0, 4]]),
        (8, 2, [[4, 0, 0, 0]] * 2 + [[0, 4, 0, 0]] * 2 + [[0, 0, 4, 0]] * 2 + [[0, 0, 0, 4]] * 2),  # more than patches
    ],
)
def test_pooling(queries, side, expected):
    """Four times the weights of the four patches; one row for each embedding."""
    np.testing.assert_array_equal(4 * pooling(queries, side), expected)


def test_eight_groups_of_a_four_by_four_grid():
    """The mini model's pooling: the embedding of each patch, at its place in the grid."""
    groups = pooling(8, 4).argmax(0).reshape(4, 4)
    np.testing.assert_array_equal(groups, [[0, 1, 2, 3], [0, 1, 2, 3], [4, 5, 6, 7], [4, 5, 6, 7]])
    assert np.count_nonzero(pooling(32, 16), axis=1).tolist() == [8] * 32, "the published sizes: 32 groups of 8 of 256"


@hypothesis.given(st.integers(1, 40), st.integers(1, 9))
def test_pooling_averages_and_leaves_no_patch_out(queries, side):
    weights = pooling(queries, side)
    assert weights.shape == (queries, side * side)
    np.testing.assert_allclose(weights.sum(1), 1.0, rtol=1e-6)
    assert (weights.sum(0) > 0).all()


def test_pooled_patches_are_a_mean_and_a_linear_map():
    """Four patches of width 1, two embeddings of width 2; CLS (100) is not among them."""
    config = of_kind("pooled", queries=2)
    module = jax.eval_shape(lambda: emu.EmuModel(emu.nnx.Rngs(params=0), config)).causal
    assert isinstance(module, PooledPatches)
    params = emu.init(config, jax.random.key(0))
    width = config.vision.width
    kernel = np.zeros((width, config.llama.width), np.float32)
    kernel[0, :2] = [10.0, -1.0]
    bias = np.zeros(config.llama.width, np.float32)
    bias[1] = 0.5
    params["causal"]["projection"] = {"kernel": jnp.asarray(kernel), "bias": jnp.asarray(bias)}
    features = np.zeros((1, 5, width), np.float32)
    features[0, :, 0] = [100.0, 1.0, 2.0, 3.0, 6.0]  # CLS; the grid 1 2 / 3 6
    embeds = emu.bind(config, params).causal(jnp.asarray(features))
    # Columns of the grid: means 2 and 4.
    np.testing.assert_allclose(np.asarray(embeds)[0, :, :2], [[20.0, -1.5], [40.0, -3.5]], rtol=1e-6)


def test_pooled_patches_have_a_projection_alone():
    config = of_kind("pooled")
    shapes = jax.tree.map(lambda leaf: leaf.shape, emu.abstract(config)["causal"])
    assert shapes == {"projection": {"kernel": (16, 16), "bias": (16,)}}
    assert emu.logical_axes(config)["causal"] == {"projection": {"kernel": ("embed", "mlp"), "bias": ("mlp",)}}


@pytest.mark.parametrize("kind", KINDS)
def test_forward_flops_are_those_of_the_compiled_encoder(kind):
    """For every kind, within 6% of the compiler's count: products dominate in a wide model."""
    fields = models.debug()
    fields.vision.update({"image_size": 64, "width": 128, "layers": 1, "heads": 4, "mlp_dim": 256})
    fields.causal.update({"kind": kind, "queries": 16, "width": 128, "heads": 4, "head_dim": 32, "mlp_dim": 256})
    fields.update({"unroll": True})
    config = emu.EmuConfig.from_dict(fields)
    pixels = jax.ShapeDtypeStruct((4, 64, 64, 3), jnp.float32)
    encode = jax.jit(lambda params, pixels: emu.bind(config, params).encode(pixels)["causal_embeds"])
    counted = encode.lower(emu.abstract(config), pixels).compile().cost_analysis()["flops"]
    flops = forward_flops(config, images=4, rows=0, row_tokens=1)
    assert counted == pytest.approx(flops["vision"] + flops["causal"], rel=0.06)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "casual"}, r"model\.causal\.kind='casual' is unknown; choose one of causal, bidirectional, pooled"),
        ({"queries": 0}, r"model\.causal\.queries=0; expected at least 1"),
        (
            {"kind": "bidirectional", "buckets": 7},
            r"model\.causal\.buckets=7; bidirectional queries need an even number",
        ),
    ],
)
def test_what_cannot_be(fields, message):
    with pytest.raises(UserError, match=message):
        CausalConfig(**({"queries": 4, "width": 16, "layers": 2, "heads": 2, "head_dim": 4, "mlp_dim": 24} | fields))
