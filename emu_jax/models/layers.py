"""Building blocks shared by the three networks: linear maps, norms, attention and the scan over depth.

Every function takes and returns plain arrays; modules only declare parameters and their logical axes, which the
logical axis rules of `sharding.py` map to the mesh. Everything is computed in the dtype of the input, except norms,
softmax and RoPE, which are computed in float32.

Array types name axes in one alphabet: B batch, S sequence, T keys, I images, P patches, Q queries, D width, N heads,
H head, F hidden, V vocabulary. Tests check them at run time (`tests/array_types.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Bool, Float, Int

from emu_jax.errors import UserError
from emu_jax.models.quantise import KINDS, dequantise, scale_shape

if TYPE_CHECKING:
    Array = jax.Array
else:
    Array = jax.Array | np.ndarray  # outside jit, run-time checks accept numpy arrays wherever JAX does

_policies = jax.checkpoint_policies
# What is saved of a block for its backward pass; everything else is recomputed.
REMAT_POLICIES: dict[str, Callable | None] = {
    "none": None,  # everything
    "full": _policies.nothing_saveable,  # only its input
    "auto": _policies.nothing_saveable,  # the same, where nobody has chosen; training chooses by the kind of device
    "attention": _policies.save_only_these_names("qkv", "attention"),  # queries, keys, values, attention's output
    "dots": _policies.save_from_both_policies(  # the same and the outputs of all linear maps
        _policies.dots_with_no_batch_dims_saveable, _policies.save_only_these_names("qkv", "attention")
    ),
    # The same as "attention", in the host's memory.
    "offload": _policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["qkv", "attention"],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


ADAPTER_LEAVES = ("lora_a", "lora_b")  # the two factors of a LoRA adapter, beside `kernel`


def check_remat(where: str, remat: str) -> None:
    """Raises unless the `remat` of the model config at `where` is known."""
    if remat not in REMAT_POLICIES:
        raise UserError(f"{where}.remat={remat!r} is unknown; choose one of {sorted(REMAT_POLICIES)}")


def check_compute(where: str, config: Any) -> None:
    """Raises unless `dtype` and `param_dtype` of the model config at `where` are known."""
    for name in ("dtype", "param_dtype"):
        if getattr(config, name) not in ("float32", "bfloat16"):
            raise UserError(f"{where}.{name}={getattr(config, name)!r}; expected float32 or bfloat16")


def parameter(rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str, ...], dtype: str, *, std: float) -> nnx.Param:
    """A normally distributed parameter that carries the names of its logical axes."""
    value = jax.random.normal(rngs.params(), shape, jnp.float32) * std
    return nnx.Param(value.astype(dtype), axes=axes)


def uniform(rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str, ...], dtype: str, *, bound: float) -> nnx.Param:
    """A parameter drawn uniformly from [-bound, bound], i.e. with standard deviation bound / sqrt(3)."""
    value = jax.random.uniform(rngs.params(), shape, jnp.float32, -bound, bound)
    return nnx.Param(value.astype(dtype), axes=axes)


def constant(value: float, shape: tuple[int, ...], axes: tuple[str, ...], dtype: str) -> nnx.Param:
    """A parameter with a constant initial value (norm scales, biases)."""
    return nnx.Param(jnp.full(shape, value, dtype), axes=axes)


@jax.custom_vjp
def project(x: Float[Array, "*batch D"], kernel: Float[Array, "D F"]) -> Float[Array, "*batch F"]:
    """x @ kernel."""
    return jnp.einsum("...d,df->...f", x, kernel)


def _project_backward(saved: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, kernel = saved
    flat_x, flat = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
    return jnp.einsum("...f,df->...d", gradient, kernel), jnp.einsum("nd,nf->df", flat_x, flat)


def _project_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    # Not `project` itself: remat policies look for the product, but not inside a function with a custom gradient.
    return jnp.einsum("...d,df->...f", x, kernel), (x, kernel)


project.defvjp(_project_forward, _project_backward)


@jax.custom_vjp
def project_float32(x: Float[Array, "*batch D"], kernel: Float[Array, "D F"]) -> Float[Array, "*batch F"]:
    """`project` by the master kernel, computed in x's dtype; only the kernel's gradient is float32 from its product on.

    With `project` and a kernel cast to bfloat16, each device would round the sum over its own rows, and the sums would
    be reduced over devices in bfloat16.
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


def add(
    x: Float[Array, "*batch D"], weight: Float[Array, "*axes D"], *, float32_gradients: bool
) -> Float[Array, "*batch D"]:
    """x + a weight of its last axes, in x's dtype. `float32_gradients`: sum the weight's gradient in float32."""
    return add_float32(x, weight) if float32_gradients else x + weight.astype(x.dtype)


@jax.custom_vjp
def add_float32(x: Float[Array, "*batch D"], weight: Float[Array, "*axes D"]) -> Float[Array, "*batch D"]:
    """`add` whose gradient of the weight is summed in float32."""
    return x + weight.astype(x.dtype)


def _add_float32_backward(weight: Array, gradient: Array) -> tuple[Array, Array]:
    copies = gradient.astype(jnp.float32).sum(tuple(range(gradient.ndim - weight.ndim)))
    return gradient, copies.astype(weight.dtype)


add_float32.defvjp(lambda x, weight: (x + weight.astype(x.dtype), weight), _add_float32_backward)


def repeat(weight: Array, shape: tuple[int, ...], dtype: jnp.dtype, *, float32_gradients: bool) -> Array:
    """A weight broadcast to `shape` in `dtype`. `float32_gradients`: sum its gradient over the copies in float32."""
    if float32_gradients:
        return jnp.broadcast_to(weight, shape).astype(dtype)
    return jnp.broadcast_to(weight.astype(dtype), shape)


class Linear(nnx.Module):
    """y = x @ kernel + bias with kernel [in, out]; x [..., in] -> [..., out] in x's dtype.

    Initialisation: the kernel has standard deviation gain / sqrt(in), which suits any width (0.014 at LLaMA's 5120),
    and the bias is 0. With `as_torch` both are uniform in [-1, 1] / sqrt(in), as in torch's nn.Linear.

    With dtype int8 or int4 the kernel holds integers beside their `scale` (`quantise.py`), and neither is trained.
    With `adapter` (rank, alpha, dropout) a low-rank map is added: alpha / rank * dropout(x) lora_a lora_b, in float32
    and initially 0 (`lora.py`); without a key there is no dropout. With `float32_gradients` the gradients of kernels
    and biases are float32 in any compute dtype (`project_float32`).
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
            self.lora_a = parameter(rngs, (inputs, rank), (axes[0], "rank"), "float32", std=inputs**-0.5)
            self.lora_b = constant(0.0, (rank, outputs), ("rank", axes[1]), "float32")
            self.adapter_scale = alpha / rank
        if dtype in KINDS:
            shape = scale_shape(dtype, (inputs, outputs))
            self.scale = constant(1.0, shape, axes[-len(shape) :], "float32")
        if bias and as_torch:
            self.bias = uniform(rngs, (outputs,), (axes[1],), dtype, bound=bound)
        elif bias:
            self.bias = constant(0.0, (outputs,), (axes[1],), dtype)

    def __call__(self, x: Float[Array, "*batch D"], key: Array | None = None) -> Float[Array, "*batch F"]:
        if hasattr(self, "scale") and self.scale.ndim == 1:
            y = (project(x, self.kernel[...].astype(x.dtype)) * self.scale[...]).astype(x.dtype)
        elif hasattr(self, "scale"):
            y = project(x, dequantise(self.kernel[...], self.scale[...], x.dtype))
        else:
            y = self._project(x, self.kernel[...])
        if hasattr(self, "lora_a"):
            kept = dropout(x, self.adapter_dropout, key)
            y = y + self._project(self._project(kept, self.lora_a[...]), self.lora_b[...]) * self.adapter_scale
        return add(y, self.bias[...], float32_gradients=self.float32_gradients) if hasattr(self, "bias") else y

    def _project(self, x: Array, kernel: Array) -> Array:
        return project_float32(x, kernel) if self.float32_gradients else project(x, kernel.astype(x.dtype))


def gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Exact GELU, x Φ(x), by erf as in the reference; `jax.nn.gelu` computes the costlier erfc."""
    return x * (0.5 + 0.5 * jax.lax.erf(x * 0.5**0.5))


class LayerNorm(nnx.Module):
    """LayerNorm with scale and bias, computed in float32 and returned in x's dtype."""

    def __init__(self, width: int, eps: float, dtype: str):
        self.scale = constant(1.0, (width,), ("norm",), dtype)
        self.bias = constant(0.0, (width,), ("norm",), dtype)
        self.eps = eps

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        y = x.astype(jnp.float32)
        y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + self.eps)
        return (y * self.scale[...] + self.bias[...]).astype(x.dtype)


class RMSNorm(nnx.Module):
    """RMSNorm (T5's and LLaMA's: no mean, no bias), computed in float32 and returned in x's dtype."""

    def __init__(self, width: int, eps: float, dtype: str):
        self.scale = constant(1.0, (width,), ("norm",), dtype)
        self.eps = eps

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + self.eps)
        return (y * self.scale[...]).astype(x.dtype)


def dropout(
    x: Float[Array, "*shape"], rate: float, key: Array | None, *, per_sample: bool = False
) -> Float[Array, "*shape"]:
    """Inverted dropout; the identity without a key. `per_sample` drops whole rows [B, ...] (drop-path)."""
    if key is None or rate == 0.0:
        return x
    shape = (x.shape[0],) + (1,) * (x.ndim - 1) if per_sample else x.shape
    keep = jax.random.bernoulli(key, 1.0 - rate, shape)
    return jnp.where(keep, x / (1.0 - rate), 0).astype(x.dtype)


def split_key(key: Array | None, count: int) -> list[Array | None]:
    """`count` keys, or as many `None`s without a key (evaluation)."""
    return [None] * count if key is None else list(jax.random.split(key, count))


def attention(
    q: Float[Array, "B N S H"],
    k: Float[Array, "B K T H"],
    v: Float[Array, "B K T H"],
    *,
    scale: float,
    bias: Float[Array, "#B #N #S #T"] | None = None,
    mask: Bool[Array | np.ndarray, "#B #N #S #T"] | None = None,
    dropout_rate: float = 0.0,
    key: Array | None = None,
) -> Float[Array, "B N S H"]:
    """Multi-head attention with scores in memory and a float32 softmax; returned in q's dtype.

    Args:
      k, v: With fewer heads than q, each serves N / K neighbouring heads of q.
      scale: Factor of the scores (1 for T5, H**-0.5 elsewhere).
      bias: Added to the scaled scores.
      mask: True where attention is allowed. A query with no allowed key gets finite but meaningless values: such
        positions are padding and are never read.
    """
    k, v = repeat_heads(k, q.shape[1]), repeat_heads(v, q.shape[1])  # [B, N, T, H]
    scores = jnp.einsum("bnsh,bnth->bnst", q * scale, k).astype(jnp.float32)  # [B, N, S, T]
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    weights = dropout(jax.nn.softmax(scores, axis=-1), dropout_rate, key).astype(q.dtype)
    return jnp.einsum("bnst,bnth->bnsh", weights, v)


def repeat_heads(x: Float[Array, "B K T H"], heads: int) -> Float[Array, "B N T H"]:
    """Keys or values with a head for each of the `heads` heads of queries."""
    return x if x.shape[1] == heads else jnp.repeat(x, heads // x.shape[1], axis=1)


def split_heads(x: Float[Array, "B S D"], head_dim: int) -> Float[Array, "B N S H"]:
    """D = N * H. A head's positions become contiguous, which suits matrix products and caches."""
    return x.reshape(*x.shape[:-1], -1, head_dim).swapaxes(-3, -2)


def merge_heads(x: Float[Array, "B N S H"]) -> Float[Array, "B S N*H"]:
    """The inverse of `split_heads`."""
    x = x.swapaxes(-3, -2)
    return x.reshape(*x.shape[:-2], -1)


def rope_tables(
    positions: Int[Array, "B S"], length: int, head_dim: int, base: float, dtype: str = "float32"
) -> tuple[Float[Array, "B S H"], Float[Array, "B S H"]]:
    """cos and signed sin in float32 for positions below `length` (rotate-half convention).

    They are looked up, not computed: compilers fuse the producer of cos and sin into every rotation of every layer,
    where a load costs almost nothing and a sine does not.

    Args:
      dtype: what cos and sin are rounded to.
    """
    frequencies = base ** (-np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)  # [H/2]
    angles = np.arange(length, dtype=np.float32)[:, None] * frequencies  # [length, H/2]
    cos, sin = (table.astype(jnp.dtype(dtype)).astype(np.float32) for table in (np.cos(angles), np.sin(angles)))
    return (
        jnp.asarray(np.concatenate([cos, cos], axis=-1))[positions],
        jnp.asarray(np.concatenate([-sin, sin], axis=-1))[positions],
    )


def apply_rope(
    x: Float[Array, "B S N H"], cos: Float[Array, "B S H"], sin: Float[Array, "B S H"]
) -> Float[Array, "B S N H"]:
    """Rotates pairs (i, i + H/2) of each head by the tables' angles, in float32.

    It multiplies whole heads, and whole heads with their halves exchanged: arrays of half a head would waste half of a
    TPU's registers and make a round trip through memory.
    """
    other = jnp.roll(x, x.shape[-1] // 2, axis=-1)  # (i + H/2) % H
    rotated = x.astype(jnp.float32) * cos[:, :, None, :] + other.astype(jnp.float32) * sin[:, :, None, :]
    return rotated.astype(x.dtype)


def stack(make: Callable[[nnx.Rngs], nnx.Module], layers: int, rngs: nnx.Rngs) -> nnx.Module:
    """`layers` modules as one, whose parameters have a leading `layers` axis."""
    keys = jax.random.split(rngs.params(), layers)
    return nnx.vmap(lambda key: make(nnx.Rngs(params=key)), in_axes=0, out_axes=0)(keys)


def scan_layers(
    blocks: nnx.Module,
    x: Float[Array, "*batch D"],
    *,
    remat: str,
    unroll: bool,
    key: Array | None = None,
    **kwargs: Any,
) -> Float[Array, "*batch D"]:
    """Runs the stacked `blocks` one after the other.

    `jax.lax.scan` over the parameters makes the compiled program hold one block at any depth; `unroll` writes the
    blocks out instead (faster on CPUs, where shallow models run). `remat` names what is saved of a block for the
    backward pass (`REMAT_POLICIES`). Each layer gets its own key, split from `key`.
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
