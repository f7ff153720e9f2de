"""Building blocks shared by the three networks: linear maps, norms, attention and the scan over depth.

Every function takes and returns plain arrays; modules only declare parameters and their logical axes
(`sharding.py` maps those to the mesh). Compute happens in the dtype of the input; norms, softmax and
RoPE are computed in float32 whatever that is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

Array = jax.Array

_policies = jax.checkpoint_policies
# What a block keeps for its backward pass; everything else is computed again.
REMAT_POLICIES: dict[str, Callable | None] = {
    "none": None,  # everything
    "full": _policies.nothing_saveable,  # its input alone
    "attention": _policies.save_only_these_names("qkv", "attention"),  # queries, keys, values and their mixture
    "dots": _policies.save_from_both_policies(  # these and the results of all linear maps
        _policies.dots_with_no_batch_dims_saveable, _policies.save_only_these_names("qkv", "attention")
    ),
    # As attention, in the host's memory.
    "offload": _policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["qkv", "attention"],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


def parameter(
    rngs: nnx.Rngs,
    shape: tuple[int, ...],
    axes: tuple[str, ...],
    dtype: str,
    *,
    std: float,
) -> nnx.Param:
    """A normally initialised parameter that carries the names of its logical axes."""
    value = jax.random.normal(rngs.params(), shape, jnp.float32) * std
    return nnx.Param(value.astype(dtype), axes=axes)


def uniform(rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str, ...], dtype: str, *, bound: float) -> nnx.Param:
    """A parameter drawn uniformly between -bound and bound, i.e. of standard deviation bound / sqrt(3)."""
    value = jax.random.uniform(rngs.params(), shape, jnp.float32, -bound, bound)
    return nnx.Param(value.astype(dtype), axes=axes)


def constant(value: float, shape: tuple[int, ...], axes: tuple[str, ...], dtype: str) -> nnx.Param:
    """A parameter that starts as a constant (norm scales, biases)."""
    return nnx.Param(jnp.full(shape, value, dtype), axes=axes)


@jax.custom_vjp
def project(x: Array, kernel: Array) -> Array:
    """x [..., D] @ kernel [D, F] -> [..., F]."""
    return jnp.einsum("...d,df->...f", x, kernel)


def _project_backward(saved: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, kernel = saved
    flat_x, flat = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
    return jnp.einsum("...f,df->...d", gradient, kernel), jnp.einsum("nd,nf->df", flat_x, flat)


def _project_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    # Not `project` again: remat policies look for the product, and do not look into a function with its own gradient.
    return jnp.einsum("...d,df->...f", x, kernel), (x, kernel)


project.defvjp(_project_forward, _project_backward)


@jax.custom_vjp
def project_float32(x: Array, kernel: Array) -> Array:
    """`project` by the master kernel, computed in x's dtype; only the kernel's gradient is float32 from its product on.

    `project` by a kernel that was cast to bfloat16 has a bfloat16 gradient: each device rounds its own rows' sum, and
    the devices' sums are added in bfloat16.
    """
    return jnp.einsum("...d,df->...f", x, kernel.astype(x.dtype))


def _project_float32_backward(saved: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, kernel = saved
    flat_x, flat = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
    kernel_gradient = jnp.einsum("nd,nf->df", flat_x, flat, preferred_element_type=jnp.float32)
    return jnp.einsum("...f,df->...d", gradient, kernel.astype(x.dtype)), kernel_gradient.astype(kernel.dtype)


def _project_float32_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return jnp.einsum("...d,df->...f", x, kernel.astype(x.dtype)), (x, kernel)


project_float32.defvjp(_project_float32_forward, _project_float32_backward)


def add(x: Array, weight: Array, *, float32_gradients: bool) -> Array:
    """x [..., F] + a weight of x's last axes, in x's dtype; the weight's gradient is summed in float32, or in that."""
    return add_float32(x, weight) if float32_gradients else x + weight.astype(x.dtype)


@jax.custom_vjp
def add_float32(x: Array, weight: Array) -> Array:
    """`add` with a gradient of the weight that is summed in float32."""
    return x + weight.astype(x.dtype)


def _add_float32_backward(weight: Array, gradient: Array) -> tuple[Array, Array]:
    copies = gradient.astype(jnp.float32).sum(tuple(range(gradient.ndim - weight.ndim)))
    return gradient, copies.astype(weight.dtype)


add_float32.defvjp(lambda x, weight: (x + weight.astype(x.dtype), weight), _add_float32_backward)


def repeat(weight: Array, shape: tuple[int, ...], dtype: jnp.dtype, *, float32_gradients: bool) -> Array:
    """A weight in `dtype`, repeated to `shape`; its gradient is summed over the copies in float32, or in `dtype`."""
    if float32_gradients:
        return jnp.broadcast_to(weight, shape).astype(dtype)
    return jnp.broadcast_to(weight.astype(dtype), shape)


class Linear(nnx.Module):
    """y = x @ kernel + bias with kernel [in, out]; x [..., in] -> [..., out] in x's dtype.

    The kernel starts with standard deviation gain / sqrt(in), which fits any width (0.014 at LLaMA's 5120), and the
    bias at 0; with `as_torch` both start as torch's nn.Linear has them, uniform within 1 / sqrt(in). With dtype int8
    the kernel holds integers, and y is multiplied by `scale` [out] (`quantise.py`); it is never trained. With `adapter`
    (rank, alpha, dropout) a low-rank map is added: alpha / rank * dropout(x) a b, float32 and 0 at first (`lora.py`);
    without a key nothing is dropped. Where `float32_gradients` is set, gradients of kernels and biases are float32
    whatever x is (`project_float32`).
    """

    def __init__(
        self,
        rngs: nnx.Rngs,
        inputs: int,
        outputs: int,
        axes: tuple[str, str],
        dtype: str,
        *,
        bias: bool = False,
        gain: float = 1.0,
        as_torch: bool = False,
        adapter: tuple[int, float, float] | None = None,
    ):
        self.float32_gradients = False
        bound = inputs**-0.5
        if as_torch:
            self.kernel = uniform(rngs, (inputs, outputs), axes, dtype, bound=bound)
        else:
            self.kernel = parameter(rngs, (inputs, outputs), axes, dtype, std=gain * bound)
        if adapter is not None:
            rank, alpha, self.adapter_dropout = adapter
            self.a = parameter(rngs, (inputs, rank), (axes[0], "rank"), "float32", std=inputs**-0.5)
            self.b = constant(0.0, (rank, outputs), ("rank", axes[1]), "float32")
            self.adapter_scale = alpha / rank
        if dtype == "int8":
            self.scale = constant(1.0, (outputs,), (axes[1],), "float32")
        if bias and as_torch:
            self.bias = uniform(rngs, (outputs,), (axes[1],), dtype, bound=bound)
        elif bias:
            self.bias = constant(0.0, (outputs,), (axes[1],), dtype)

    def __call__(self, x: Array, key: Array | None = None) -> Array:
        if hasattr(self, "scale"):
            y = (project(x, self.kernel[...].astype(x.dtype)) * self.scale[...]).astype(x.dtype)
        else:
            y = self._project(x, self.kernel[...])
        if hasattr(self, "a"):
            kept = dropout(x, self.adapter_dropout, key)
            y = y + self._project(self._project(kept, self.a[...]), self.b[...]) * self.adapter_scale
        return add(y, self.bias[...], float32_gradients=self.float32_gradients) if hasattr(self, "bias") else y

    def _project(self, x: Array, kernel: Array) -> Array:
        return project_float32(x, kernel) if self.float32_gradients else project(x, kernel.astype(x.dtype))


def gelu(x: Array) -> Array:
    """Exact GELU, x Φ(x) by erf as the reference has it; `jax.nn.gelu` computes the costlier erfc."""
    return x * (0.5 + 0.5 * jax.lax.erf(x * 0.5**0.5))


class LayerNorm(nnx.Module):
    """LayerNorm with scale and bias, in float32; x [..., D] -> [..., D] in x's dtype."""

    def __init__(self, width: int, eps: float, dtype: str):
        self.scale = constant(1.0, (width,), ("norm",), dtype)
        self.bias = constant(0.0, (width,), ("norm",), dtype)
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        y = x.astype(jnp.float32)
        y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + self.eps)
        return (y * self.scale[...] + self.bias[...]).astype(x.dtype)


class RMSNorm(nnx.Module):
    """RMSNorm (T5's and LLaMA's: no mean, no bias), in float32; x [..., D] -> [..., D] in x's dtype."""

    def __init__(self, width: int, eps: float, dtype: str):
        self.scale = constant(1.0, (width,), ("norm",), dtype)
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + self.eps)
        return (y * self.scale[...]).astype(x.dtype)


def dropout(x: Array, rate: float, key: Array | None, *, per_sample: bool = False) -> Array:
    """Inverted dropout; identity without a key. `per_sample` drops whole rows [B, ...] (drop-path)."""
    if key is None or rate == 0.0:
        return x
    shape = (x.shape[0],) + (1,) * (x.ndim - 1) if per_sample else x.shape
    keep = jax.random.bernoulli(key, 1.0 - rate, shape)
    return jnp.where(keep, x / (1.0 - rate), 0).astype(x.dtype)


def split_key(key: Array | None, count: int) -> list[Array | None]:
    """`count` keys, or as many `None`s when there is no randomness (evaluation)."""
    return [None] * count if key is None else list(jax.random.split(key, count))


def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    scale: float,
    bias: Array | None = None,
    mask: Array | None = None,
    dropout_rate: float = 0.0,
    key: Array | None = None,
) -> Array:
    """Plain multi-head attention with a float32 softmax.

    Args:
      q: [B, N, S, H]; k, v: [B, N, T, H].
      scale: what the scores are multiplied by (1 for T5, H**-0.5 elsewhere).
      bias: added to the scores, broadcastable to [B, N, S, T].
      mask: bool, True where attention is allowed, broadcastable to [B, N, S, T]. A query with no
        allowed key gets a finite, meaningless mixture: such rows are padding and are never read.

    Returns:
      [B, N, S, H] in q's dtype.
    """
    scores = jnp.einsum("bnsh,bnth->bnst", q * scale, k).astype(jnp.float32)  # [B, N, S, T]
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    weights = dropout(jax.nn.softmax(scores, axis=-1), dropout_rate, key).astype(q.dtype)
    return jnp.einsum("bnst,bnth->bnsh", weights, v)


def split_heads(x: Array, head_dim: int) -> Array:
    """[B, S, N*H] -> [B, N, S, H]: a head's positions lie together, as matrix products and caches want them."""
    return x.reshape(*x.shape[:-1], -1, head_dim).swapaxes(-3, -2)


def merge_heads(x: Array) -> Array:
    """[B, N, S, H] -> [B, S, N*H]."""
    x = x.swapaxes(-3, -2)
    return x.reshape(*x.shape[:-2], -1)


def rope_tables(positions: Array, length: int, head_dim: int, base: float) -> tuple[Array, Array]:
    """cos and signed sin [B, S, H] in float32 for positions [B, S] below `length` (rotate-half convention).

    Looked up, not computed: compilers fuse the producer of cos and sin into each rotation of each layer, where a load
    costs next to nothing and a sine does not.
    """
    frequencies = base ** (-np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)  # [H/2]
    angles = np.arange(length, dtype=np.float32)[:, None] * frequencies  # [length, H/2]
    cos, sin = np.cos(angles), np.sin(angles)
    return (
        jnp.asarray(np.concatenate([cos, cos], axis=-1))[positions],
        jnp.asarray(np.concatenate([-sin, sin], axis=-1))[positions],
    )


def apply_rope(x: Array, cos: Array, sin: Array) -> Array:
    """Rotates pairs (i, i + H/2) of x [B, S, N, H] by the angles of tables [B, S, H]; float32 inside.

    Whole heads are multiplied, beside themselves with their halves exchanged: arrays of half a head would waste half of
    a TPU's registers and be written to memory and read again.
    """
    other = jnp.roll(x, x.shape[-1] // 2, axis=-1)  # (i + H/2) % H
    rotated = x.astype(jnp.float32) * cos[:, :, None, :] + other.astype(jnp.float32) * sin[:, :, None, :]
    return rotated.astype(x.dtype)


def stack(make: Callable[[nnx.Rngs], nnx.Module], layers: int, rngs: nnx.Rngs) -> nnx.Module:
    """One module whose every parameter has a leading `layers` axis: the depth of a network, stacked."""
    keys = jax.random.split(rngs.params(), layers)
    return nnx.vmap(lambda key: make(nnx.Rngs(params=key)), in_axes=0, out_axes=0)(keys)


def scan_layers(
    blocks: nnx.Module, x: Array, *, remat: str, unroll: bool, key: Array | None = None, **kwargs: Any
) -> Array:
    """Runs the stacked `blocks` one after the other: x [B, S, D] -> [B, S, D].

    `jax.lax.scan` over the parameters, so that the compiled program holds one block whatever the depth;
    `unroll` writes the blocks out instead (faster on CPUs, where shallow models run). `remat` names what
    a block keeps for the backward pass (`REMAT_POLICIES`). Each layer draws from its own `key`.
    """
    graph, params = nnx.split(blocks)
    layers = jax.tree.leaves(params)[0].shape[0]
    keys = None if key is None else jax.random.split(key, layers)

    def block(x: Array, layer: tuple) -> tuple[Array, None]:
        params, key = layer
        return nnx.merge(graph, params)(x, key=key, **kwargs), None

    if REMAT_POLICIES[remat] is not None:
        block = jax.checkpoint(block, policy=REMAT_POLICIES[remat], prevent_cse=unroll)
    return jax.lax.scan(block, x, (params, keys), unroll=layers if unroll else 1)[0]


def named_axes(state: nnx.State) -> dict[str, Any]:
    """A module's parameter tree with a tuple of logical axis names at every leaf; stacked layers add "layers"."""
    tree: dict[Any, Any] = {}
    for path, variable in nnx.to_flat_state(state):
        node = tree
        for part in path[:-1]:
            node = node.setdefault(part, {})
        stacked = len(variable.shape) - len(variable.axes)
        node[path[-1]] = ("layers",) * stacked + tuple(variable.axes)
    return tree
