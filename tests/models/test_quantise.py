"""int8 kernels: rounding within half a step, and a model whose output hardly changes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs import models
from emu_jax.errors import UserError
from emu_jax.models import emu
from emu_jax.models.paths import flatten
from emu_jax.models.quantise import is_quantised, quantise
from tests.models.quantised import quantise_params
from tests.train.tasks import interleaved


def test_columns_are_scaled_apart():
    kernel = np.array([[1.27, -300.0, 0.0], [-0.5, 100.0, 0.0]], np.float32)
    integers, scale = quantise(kernel)
    np.testing.assert_array_equal(integers, [[127, -127, 0], [-50, 42, 0]])
    np.testing.assert_allclose(scale, [0.01, 300 / 127, 1.0], rtol=1e-6)


@given(inputs=st.integers(1, 9), outputs=st.integers(1, 9), seed=st.integers(0, 99), size=st.floats(1e-20, 1e20))
def test_errors_are_half_a_step(inputs, outputs, seed, size):
    kernel = (np.random.default_rng(seed).standard_normal((inputs, outputs)) * size).astype(np.float32)
    integers, scale = quantise(kernel)
    assert integers.dtype == np.int8 and np.abs(integers.astype(int)).max() == 127
    assert (np.abs(integers * scale - kernel) <= 0.501 * scale).all()


def test_kernels_of_the_blocks_alone():
    paths = flatten(emu.abstract(emu.EmuConfig.from_dict(models.debug())))
    assert {path for path in paths if is_quantised(path)} == {
        f"llama/blocks/{name}/kernel"
        for name in ("attn/q", "attn/k", "attn/v", "attn/o", "mlp/gate", "mlp/up", "mlp/down")
    }
    assert is_quantised("params/llama/blocks/mlp/up/kernel") and not is_quantised("params/llama/lm_head/kernel")


def test_a_quantised_model_computes_with_its_integers():
    config = emu.EmuConfig.from_dict(models.debug())
    params = emu.init(config, jax.random.key(0))
    small = dataclasses.replace(config, llama=dataclasses.replace(config.llama, int8=True))
    quantised = quantise_params(params)
    assert jax.tree.map(jnp.shape, quantised) == jax.tree.map(jnp.shape, emu.abstract(small))
    rounded = jax.tree.map(np.asarray, params)
    for stack in rounded["llama"]["blocks"].values():
        for name, part in stack.items() if "scale" not in stack else ():
            integers, scale = quantise(part["kernel"])
            stack[name] = {"kernel": integers * scale[..., None, :]}
    tokens = jnp.arange(12)[None] % config.llama.vocab_size
    positions, segments = jnp.arange(12)[None], jnp.ones((1, 12), jnp.int32)

    def hidden(config: emu.EmuConfig, params: emu.Params) -> np.ndarray:
        network = emu.bind(config, params).llama
        return np.asarray(network(network.embed(tokens), positions, segments))

    np.testing.assert_allclose(hidden(small, quantised), hidden(config, rounded), atol=1e-5)


def test_it_cannot_be_trained():
    fields = models.debug().to_dict()
    fields["llama"]["int8"] = True
    with pytest.raises(UserError, match=r"config\.model\.llama\.int8=True: integers are not trained"):
        interleaved(emu.EmuConfig.from_dict(fields))
