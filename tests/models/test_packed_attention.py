"""Packed attention: the mask, and the TPU kernel against plain attention, on one device and sharded over a mesh."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emu_jax.errors import UserError
from emu_jax.models.packed_attention import packed_attention, segment_mask

ROOT = Path(__file__).parents[2]


def test_segment_mask_is_block_diagonal_and_causal():
    mask = segment_mask(jnp.array([[1, 1, 2, 2, 0]]))[0, 0].astype(int)
    expected = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 1]]
    np.testing.assert_array_equal(mask, expected)


def results(kernel: str, head_dim: int = 128, kv_heads: int = 2) -> dict[str, np.ndarray]:
    """Attention's output at the real positions of uneven segments, and the gradients of a function of it."""
    length = 256
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 2, length, head_dim))
    k, v = k[:, :kv_heads], v[:, :kv_heads]
    cuts = jnp.array([[60, 100, 230], [128, 129, length]])
    segments = 1 + (jnp.arange(length)[None, :, None] >= cuts[:, None, :]).sum(-1)
    real = (segments < 4)[:, None, :, None]

    def f(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        attend = packed_attention(jnp.where(segments == 4, 0, segments), head_dim, kernel)
        mixed = jnp.where(real, attend(q, k, v), 0)
        return jnp.sin(mixed).sum(), mixed

    gradients, mixed = jax.jit(jax.grad(f, (0, 1, 2), has_aux=True))(q, k, v)
    return {name: np.asarray(x) for name, x in zip(("mixed", "dq", "dk", "dv"), (mixed, *gradients), strict=True)}


@pytest.mark.long
@pytest.mark.parametrize(("head_dim", "kv_heads"), [(128, 2), (40, 2), (128, 1)])
def test_the_tpu_kernel_equals_plain_attention(head_dim, kv_heads):
    plain, splash = (results(kernel, head_dim, kv_heads) for kernel in ("plain", "splash"))
    for name, expected in plain.items():
        np.testing.assert_allclose(splash[name], expected, atol=2e-5, err_msg=name)


SHARDED = """
import sys
import jax, numpy as np
from emu_jax.sharding import make_mesh
from tests.models.test_packed_attention import results
with jax.set_mesh(make_mesh({sys.argv[1]: 2})):
    np.savez(sys.argv[2], **results("splash", kv_heads=int(sys.argv[3])))
"""


@pytest.mark.long
@pytest.mark.parametrize(("axis", "kv_heads"), [("fsdp", 2), ("tensor", 2), ("context", 1), ("tensor", 1)])
def test_the_tpu_kernel_is_sharded_over_a_mesh(axis, kv_heads, tmp_path):
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    file = tmp_path / "sharded.npz"
    command = [sys.executable, "-c", SHARDED, axis, file, str(kv_heads)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name, expected in results("plain", kv_heads=kv_heads).items():
        np.testing.assert_allclose(np.load(file)[name], expected, atol=2e-5, err_msg=f"{axis}: {name}")


def test_rows_that_the_tpu_kernel_does_not_support():
    with pytest.raises(
        UserError,
        match=r"config\.model\.llama\.attention=splash: rows of 100 positions over context=1; it needs a multiple of "
        r"128 on each device; choose plain",
    ):
        packed_attention(jnp.ones((1, 100), jnp.int32), 128, "splash")
