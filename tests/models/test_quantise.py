"""Integer kernels: rounding within half a step, and a model that computes with them."""

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
from emu_jax.models.quantise import CLIPS, KINDS, dequantise, is_quantised, quantise, scale_shape
from tests.models.quantised import quantise_params
from tests.train.tasks import interleaved


def test_columns_are_scaled_apart():
    kernel = np.array([[1.27, -300.0, 0.0], [-0.5, 100.0, 0.0]], np.float32)
    integers, scale = quantise(kernel, "int8")
    np.testing.assert_array_equal(integers, [[127, -127, 0], [-50, 42, 0]])
    np.testing.assert_allclose(scale, [0.01, 300 / 127, 1.0], rtol=1e-6)


@given(inputs=st.integers(1, 9), outputs=st.integers(1, 9), seed=st.integers(0, 99), size=st.floats(1e-20, 1e20))
def test_errors_are_half_a_step(inputs, outputs, seed, size):
    kernel = (np.random.default_rng(seed).standard_normal((inputs, outputs)) * size).astype(np.float32)
    integers, scale = quantise(kernel, "int8")
    assert integers.dtype == np.int8 and np.abs(integers.astype(int)).max() == 127
    assert (np.abs(integers * scale - kernel) <= 0.501 * scale).all()


@pytest.mark.long
@given(
    groups=st.integers(1, 3),
    outputs=st.integers(1, 5),
    layers=st.sampled_from([(), (2,)]),
    seed=st.integers(0, 99),
    size=st.floats(1e-20, 1e20),
)
def test_groups_of_rows_are_scaled_apart(groups, outputs, layers, seed, size):
    """Against a loop over groups and columns: the scale is the candidate with the least squared error."""
    kernel = np.random.default_rng(seed).standard_t(3, (*layers, groups * 128, outputs)) * size
    kernel = kernel.astype(np.float32)
    kernel[..., :128, 0] = 0.0
    integers, scale = quantise(kernel, "int4")
    assert integers.dtype == KINDS["int4"] and scale.shape == (*layers, groups, outputs)
    restored = np.asarray(dequantise(integers, scale, np.float32))
    for index in np.ndindex(scale.shape):
        *layer, group, column = index
        rows = kernel[(*layer, slice(128 * group, 128 * (group + 1)), column)].astype(np.float64)
        found = restored[(*layer, slice(128 * group, 128 * (group + 1)), column)]
        errors = []
        for clip in CLIPS:
            step = (np.abs(rows).max() or 7.0) * clip / 7
            errors.append(np.square(np.clip(np.rint(rows / step), -7, 7) * step - rows).sum())
        assert np.square(found - rows).sum() <= min(errors) * 1.001, f"{index}: expected {min(errors)}"
    assert (scale[..., 0, 0] == 1.0).all(), "zeros"


def test_narrow_kernels_have_one_scale_a_column():
    assert scale_shape("int4", (3, 24, 8)) == (3, 1, 8) and scale_shape("int4", (48, 8)) == (3, 8)


def test_kernels_of_the_blocks_alone():
    paths = flatten(emu.abstract(emu.EmuConfig.from_dict(models.debug())))
    assert {path for path in paths if is_quantised(path)} == {
        f"llama/blocks/{name}/kernel"
        for name in ("attn/q", "attn/k", "attn/v", "attn/o", "mlp/gate", "mlp/up", "mlp/down")
    }
    assert is_quantised("params/llama/blocks/mlp/up/kernel") and not is_quantised("params/llama/lm_head/kernel")


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_model_computes_with_its_integers(kind):
    config = emu.EmuConfig.from_dict(models.debug())
    params = emu.init(config, jax.random.key(0))
    small = dataclasses.replace(config, llama=dataclasses.replace(config.llama, quantised=kind))
    quantised = quantise_params(params, kind)
    assert jax.tree.map(jnp.shape, quantised) == jax.tree.map(jnp.shape, emu.abstract(small))
    rounded = jax.tree.map(np.asarray, params)
    for stack in rounded["llama"]["blocks"].values():
        for name, part in stack.items() if "scale" not in stack else ():
            stack[name] = {"kernel": dequantise(*quantise(part["kernel"], kind), np.float32)}
    tokens = jnp.arange(12)[None] % config.llama.vocab_size
    positions, segments = jnp.arange(12)[None], jnp.ones((1, 12), jnp.int32)

    def hidden(config: emu.EmuConfig, params: emu.Params) -> np.ndarray:
        network = emu.bind(config, params).llama
        return np.asarray(network(network.embed(tokens), positions, segments))

    np.testing.assert_allclose(hidden(small, quantised), hidden(config, rounded), atol=1e-5)


def test_a_kind_that_is_unknown():
    fields = models.debug().to_dict()
    fields["llama"]["quantised"] = "int2"
    with pytest.raises(UserError, match=r"model\.llama\.quantised='int2'; expected '' or one of int8, int4"):
        emu.EmuConfig.from_dict(fields)


def test_it_cannot_be_trained():
    fields = models.debug().to_dict()
    fields["llama"]["quantised"] = "int4"
    with pytest.raises(UserError, match=r"config\.model\.llama\.quantised=int4: integers are not trained"):
        interleaved(emu.EmuConfig.from_dict(fields))
