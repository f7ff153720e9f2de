"""The language model: packed segments, and decoding from a cache."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import models
from emu_jax.errors import UserError
from emu_jax.models import emu
from emu_jax.models.layers import rope_tables
from emu_jax.models.llama import Llama, LlamaConfig

CONFIG = emu.EmuConfig.from_dict(models.debug())
GROUPED = dataclasses.replace(CONFIG, llama=dataclasses.replace(CONFIG.llama, heads=4, kv_heads=2))


def bound(config: emu.EmuConfig) -> Llama:
    return emu.bind(config, emu.init(config, jax.random.key(0))).llama


@pytest.mark.long
@pytest.mark.parametrize("config", [CONFIG, GROUPED], ids=["equal heads", "grouped heads"])
@pytest.mark.parametrize("steps", [[7], [4, 1, 1, 1], [1, 6]])
def test_decoding_from_a_cache_equals_one_forward_pass(steps, config):
    llama = bound(config)
    x = jax.random.normal(jax.random.key(1), (2, 7, CONFIG.llama.width))
    positions = jnp.broadcast_to(jnp.arange(7), (2, 7))
    whole = llama(x, positions, jnp.ones((2, 7), jnp.int32))
    cache, pieces, start = llama.init_cache(2, 9, "float32"), [], 0
    for count in steps:
        piece = slice(start, start + count)
        hidden, cache = llama.decode(x[:, piece], positions[:, piece], cache)
        pieces.append(hidden)
        start += count
    np.testing.assert_allclose(jnp.concatenate(pieces, 1), whole, atol=2e-5)


def test_tables_rounded_to_bfloat16():
    """Eight bits of each sine are left, the hidden states change by about as much, and another dtype is refused."""
    positions = jnp.arange(300)[None]
    exact, rounded = (rope_tables(positions, 300, 16, 1e4, dtype) for dtype in ("float32", "bfloat16"))
    for ours, table in zip(rounded, exact, strict=True):
        assert ours.dtype == jnp.float32
        np.testing.assert_array_equal(ours, table.astype(jnp.bfloat16).astype(jnp.float32))
    x = jax.random.normal(jax.random.key(1), (1, 40, CONFIG.llama.width))
    half = dataclasses.replace(CONFIG, llama=dataclasses.replace(CONFIG.llama, rope_dtype="bfloat16"))
    inputs = x, jnp.arange(40)[None], jnp.ones((1, 40), jnp.int32)
    difference = float(jnp.abs(bound(CONFIG)(*inputs) - bound(half)(*inputs)).max())
    assert 1e-4 < difference < 0.1, difference
    with pytest.raises(
        UserError, match=r"model\.llama\.rope_dtype='float16' is unknown; choose one of float32, bfloat16"
    ):
        dataclasses.replace(CONFIG.llama, rope_dtype="float16")


def test_left_padding_changes_nothing():
    llama = bound(CONFIG)
    x = jax.random.normal(jax.random.key(1), (1, 5, CONFIG.llama.width))
    alone, _ = llama.decode(x, jnp.arange(5)[None], llama.init_cache(1, 8, "float32"))
    padded = jnp.concatenate([jnp.full((1, 3, CONFIG.llama.width), 7.0), x], axis=1)
    positions = jnp.maximum(jnp.arange(8) - 3, 0)[None]
    valid = (jnp.arange(8) >= 3)[None]
    hidden, _ = llama.decode(padded, positions, llama.init_cache(1, 8, "float32"), valid)
    np.testing.assert_allclose(hidden[:, 3:], alone, atol=2e-5)


def test_grouped_heads_share_keys_and_values():
    """Kernels of keys and values that are repeated for every head of queries give the same."""
    x = jax.random.normal(jax.random.key(1), (2, 7, CONFIG.llama.width))
    positions = jnp.broadcast_to(jnp.arange(7), (2, 7))
    grouped = emu.init(GROUPED, jax.random.key(0))
    equal = jax.tree.map(lambda leaf: leaf, grouped)
    for name in ("k", "v"):
        kernel = grouped["llama"]["blocks"]["attn"][name]["kernel"]  # [L, D, K * H]
        heads = kernel.reshape(*kernel.shape[:2], 2, -1)
        equal["llama"]["blocks"]["attn"][name]["kernel"] = jnp.repeat(heads, 2, axis=2).reshape(*kernel.shape[:2], -1)
    config = dataclasses.replace(GROUPED, llama=dataclasses.replace(GROUPED.llama, kv_heads=4))
    found = emu.bind(GROUPED, grouped).llama(x, positions, jnp.ones((2, 7), jnp.int32))
    expected = emu.bind(config, equal).llama(x, positions, jnp.ones((2, 7), jnp.int32))
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_heads_of_keys_divide_those_of_queries():
    with pytest.raises(UserError, match=r"model\.llama\.kv_heads=3 must divide model\.llama\.heads=4, or be 0"):
        LlamaConfig(vocab_size=8, width=32, layers=1, heads=4, kv_heads=3, mlp_dim=8)


def test_odd_head_width_is_refused_at_construction():
    with pytest.raises(UserError, match=r"model\.llama\.width=30 must be model\.llama\.heads=2"):
        LlamaConfig(vocab_size=8, width=30, layers=1, heads=2, mlp_dim=8)
