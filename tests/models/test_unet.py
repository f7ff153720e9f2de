"""The U-Net's fused attention over many pixels, on any device."""

import jax
import numpy as np
import pytest

from emu_jax.models.layers import attention
from emu_jax.models.unet import LONG_ATTENTION, fused_attention


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_long_attention(dtype, tolerance):
    """bfloat16 too, for which GPUs have a kernel."""
    q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 2, LONG_ATTENTION, 8)).astype(dtype)
    mixed = jax.jit(lambda q: fused_attention(q, k, v, scale=8**-0.5))(q)
    assert mixed.dtype == dtype
    expected = attention(*(x.astype("float32") for x in (q, k, v)), scale=8**-0.5)
    np.testing.assert_allclose(np.asarray(mixed, np.float32), expected, atol=tolerance)
