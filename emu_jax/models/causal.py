"""Causal Transformer: image features [I, P + 1, Dv] -> causal embeddings [I, Q, D] in the language model's width.

A T5-v1 decoder (12 blocks of width 768 in the published model) whose inputs are Q learned queries: causal
self-attention with T5's relative-position bias, cross-attention to the image, ReLU feed-forward. Scores are not scaled
by 1/sqrt(H). A linear map with bias then projects to the language model's width.

Initial parameters follow T5, except these, for which `EmuConfig.init` chooses between the reference's values and values
that suit any width (W is the Causal Transformer's own):

                  reference                        scaled
    queries       normal, std 0.02                 normal, std 1
    cross k, v    normal, std W^-0.5               normal, std Dv^-0.5, for the width of their input
    projection    uniform in [-1, 1] W^-0.5        normal, std W^-0.5
      its bias    uniform in [-1, 1] W^-0.5        0

For ablations (`configs/ablations`) there are two alternatives: bidirectional self-attention among the queries, and
pooled patches with a linear map and no transformer.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Bool, Float

from emu_jax.errors import UserError
from emu_jax.models.layers import (
    Array,
    Linear,
    RMSNorm,
    attention,
    check_remat,
    dropout,
    merge_heads,
    parameter,
    repeat,
    scan_layers,
    split_heads,
    split_key,
    stack,
)
from emu_jax.sharding import with_logical_constraint

INITS = ("reference", "scaled")
KINDS = ("causal", "bidirectional", "pooled")


@dataclasses.dataclass(frozen=True)
class CausalConfig:
    """Sizes of the Causal Transformer. As in T5, `head_dim` is independent of the width.

    Attributes:
      kind: "causal", as published; "bidirectional", where every query sees all others; or "pooled", no transformer
        (`PooledPatches`), which uses only the field `queries`.
      remat: What is saved of a block for the backward pass (`layers.REMAT_POLICIES`).
    """

    queries: int
    width: int
    layers: int
    heads: int
    head_dim: int
    mlp_dim: int
    buckets: int = 32
    max_distance: int = 128
    norm_eps: float = 1e-6
    dropout: float = 0.0
    kind: str = "causal"
    remat: str = "none"

    def __post_init__(self):
        check_remat("model.causal", self.remat)
        if self.kind not in KINDS:
            raise UserError(f"model.causal.kind={self.kind!r} is unknown; choose one of {', '.join(KINDS)}")
        if self.queries < 1:
            raise UserError(f"model.causal.queries={self.queries}; expected at least 1")
        if self.kind == "bidirectional" and (self.buckets < 4 or self.buckets % 2):
            raise UserError(
                f"model.causal.buckets={self.buckets}; bidirectional queries need an even number of 4 or more, half of "
                "them for each direction"
            )


def relative_buckets(length: int, buckets: int, max_distance: int, *, bidirectional: bool = False) -> np.ndarray:
    """T5's buckets [length, length] of (query, key) distances: exact up to buckets/2, then logarithmic.

    With buckets=4, max_distance=8 and length=5 (keys after the query have bucket 0 and are masked):

        0 0 0 0 0
        1 0 0 0 0
        2 1 0 0 0
        2 2 1 0 0
        3 2 2 1 0

    If bidirectional, half of the buckets are for keys after the query. With buckets=8, max_distance=8 and length=4:

        0 5 6 6
        1 0 5 6
        2 1 0 5
        2 2 1 0
    """
    if bidirectional:
        before = relative_buckets(length, buckets // 2, max_distance)
        after = np.triu(np.full((length, length), buckets // 2, np.int32), 1)
        return before + before.T + after
    distance = np.maximum(np.arange(length)[:, None] - np.arange(length)[None, :], 0)
    exact = buckets // 2
    ratio = np.log(np.maximum(distance, 1) / exact, dtype=np.float32) / np.log(max_distance / exact)
    far = exact + (ratio * (buckets - exact)).astype(np.int32)
    return np.where(distance < exact, distance, np.minimum(far, buckets - 1)).astype(np.int32)


class CausalAttention(nnx.Module):
    """T5's attention of x to a memory, without biases or scaling."""

    def __init__(self, rngs: nnx.Rngs, c: CausalConfig, memory: int, dtype: str, init: str):
        inner = c.heads * c.head_dim
        # T5 initialises k and v for memories of its own width; the reference kept that for images of another width.
        gain = (memory / c.width) ** 0.5 if init == "reference" else 1.0
        self.q = Linear(rngs, c.width, inner, ("embed", "heads"), dtype, gain=c.head_dim**-0.5)
        self.k = Linear(rngs, memory, inner, ("embed", "heads"), dtype, gain=gain)
        self.v = Linear(rngs, memory, inner, ("embed", "heads"), dtype, gain=gain)
        self.o = Linear(rngs, inner, c.width, ("heads", "embed"), dtype)
        self.head_dim, self.dropout = c.head_dim, c.dropout

    def __call__(
        self,
        x: Float[Array, "I Q W"],
        memory: Float[Array, "I T M"],
        bias: Float[Array, "1 N Q T"] | None,
        mask: Bool[Array | np.ndarray, "1 1 Q T"] | None,
        key: Array | None,
    ) -> Float[Array, "I Q W"]:
        q, k, v = (split_heads(y, self.head_dim) for y in (self.q(x), self.k(memory), self.v(memory)))
        mixed = attention(q, k, v, scale=1.0, bias=bias, mask=mask, dropout_rate=self.dropout, key=key)
        return self.o(merge_heads(mixed))


class CausalMLP(nnx.Module):
    """wi, ReLU, wo."""

    def __init__(self, rngs: nnx.Rngs, c: CausalConfig, dtype: str):
        self.wi = Linear(rngs, c.width, c.mlp_dim, ("embed", "mlp"), dtype)
        self.wo = Linear(rngs, c.mlp_dim, c.width, ("mlp", "embed"), dtype)
        self.dropout = c.dropout

    def __call__(self, x: Float[Array, "I Q W"], key: Array | None) -> Float[Array, "I Q W"]:
        return self.wo(dropout(jax.nn.relu(self.wi(x)), self.dropout, key))


class CausalBlock(nnx.Module):
    """Self-attention, cross-attention to the features, feed-forward."""

    def __init__(self, rngs: nnx.Rngs, c: CausalConfig, memory: int, dtype: str, init: str):
        self.self_norm = RMSNorm(c.width, c.norm_eps, dtype)
        self.self_attn = CausalAttention(rngs, c, c.width, dtype, init)
        self.cross_norm = RMSNorm(c.width, c.norm_eps, dtype)
        self.cross_attn = CausalAttention(rngs, c, memory, dtype, init)
        self.mlp_norm = RMSNorm(c.width, c.norm_eps, dtype)
        self.mlp = CausalMLP(rngs, c, dtype)
        self.dropout = c.dropout

    def __call__(
        self,
        x: Float[Array, "I Q W"],
        *,
        features: Float[Array, "I T Dv"],
        bias: Float[Array, "1 N Q Q"],
        mask: Bool[Array | np.ndarray, "1 1 Q Q"] | None,
        key: Array | None = None,
    ) -> Float[Array, "I Q W"]:
        keys = split_key(key, 6)
        x = with_logical_constraint(x, ("image", "queries", "embed_act"))
        y = self.self_norm(x)
        x = x + dropout(self.self_attn(y, y, bias, mask, keys[0]), self.dropout, keys[1])
        y = self.cross_attn(self.cross_norm(x), features, None, None, keys[2])
        x = x + dropout(y, self.dropout, keys[3])
        return x + dropout(self.mlp(self.mlp_norm(x), keys[4]), self.dropout, keys[5])


class CausalTransformer(nnx.Module):
    """The features of all patches and CLS (T = P + 1) -> causal embeddings."""

    def __init__(self, rngs: nnx.Rngs, c: CausalConfig, features: int, outputs: int, dtype: str, init: str):
        as_reference = init == "reference"
        std = 0.02 if as_reference else 1.0
        self.queries = parameter(rngs, (c.queries, c.width), ("queries", "embed"), dtype, std=std)
        # The published checkpoint stores it in block 0; the self-attention of every block uses it.
        self.relative_bias = parameter(rngs, (c.buckets, c.heads), ("buckets", "heads"), dtype, std=c.width**-0.5)
        self.blocks = stack(lambda rngs: CausalBlock(rngs, c, features, dtype, init), c.layers, rngs)
        self.final_norm = RMSNorm(c.width, c.norm_eps, dtype)
        self.projection = Linear(rngs, c.width, outputs, ("embed", "mlp"), dtype, bias=True, as_torch=as_reference)
        self.config = c
        self.float32_gradients = False

    def __call__(
        self, features: Float[Array, "I T Dv"], *, unroll: bool = False, key: Array | None = None
    ) -> Float[Array, "I Q D"]:
        c = self.config
        keys = split_key(key, 3)
        both = c.kind == "bidirectional"
        buckets = relative_buckets(c.queries, c.buckets, c.max_distance, bidirectional=both)  # [Q, Q]
        bias = self.relative_bias[...].astype(jnp.float32)[buckets].transpose(2, 0, 1)[None]  # [1, N, Q, Q]
        mask = None if both else np.tril(np.ones((c.queries, c.queries), bool))[None, None]
        shape = (features.shape[0], c.queries, c.width)
        x = repeat(self.queries[...], shape, features.dtype, float32_gradients=self.float32_gradients)  # [I, Q, W]
        x = dropout(x, c.dropout, keys[0])
        x = scan_layers(
            self.blocks, x, remat=c.remat, unroll=unroll, key=keys[1], features=features, bias=bias, mask=mask
        )
        x = dropout(self.final_norm(x), c.dropout, keys[2])
        return self.projection(x)


def pooling(queries: int, side: int) -> np.ndarray:
    """Weights [Q, P] that pool a grid of side x side = P patches: row q averages the patches of embedding q.

    If Q equal cells tile the grid, the embeddings are the cells of the most nearly square tiling, row by row (in a tie,
    tall cells). Otherwise the patches are pooled as a sequence, as in adaptive average pooling: embedding q averages
    patches floor(qP/Q) to ceil((q+1)P/Q) - 1, and neighbours share patches.

    With side=2, queries=2 and queries=3:

        1/2  0  1/2  0          1/2 1/2  0   0
         0  1/2  0  1/2          0  1/2 1/2  0
                                 0   0  1/2 1/2
    """
    patches = side * side
    # rows x columns of cells
    tilings = [(r, queries // r) for r in range(1, side + 1) if side % r == 0 and queries % r == 0]
    tilings = [(r, c) for r, c in tilings if c <= side and side % c == 0]
    weights = np.zeros((queries, patches), np.float32)
    if tilings:
        rows, columns = min(tilings, key=lambda cells: (abs(cells[0] - cells[1]), cells[0]))
        down, across = np.divmod(np.arange(patches), side)
        cell = down // (side // rows) * columns + across // (side // columns)  # [P]
        weights[cell, np.arange(patches)] = 1.0
    else:
        for q in range(queries):
            weights[q, q * patches // queries : -(-(q + 1) * patches // queries)] = 1.0
    return weights / weights.sum(1, keepdims=True)


class PooledPatches(nnx.Module):
    """Means of patches (`pooling`), without CLS, and a linear map."""

    def __init__(self, rngs: nnx.Rngs, c: CausalConfig, features: int, outputs: int, dtype: str, init: str):
        as_torch = init == "reference"
        self.projection = Linear(rngs, features, outputs, ("embed", "mlp"), dtype, bias=True, as_torch=as_torch)
        self.config = c

    def __call__(
        self, features: Float[Array, "I T Dv"], *, unroll: bool = False, key: Array | None = None
    ) -> Float[Array, "I Q D"]:
        """The options of `CausalTransformer` have no effect: there are no layers and no dropout."""
        patches = features[:, 1:]  # [I, P, Dv]
        weights = jnp.asarray(pooling(self.config.queries, math.isqrt(patches.shape[1])), features.dtype)
        pooled = jnp.einsum("qp,npd->nqd", weights, patches)
        return self.projection(with_logical_constraint(pooled, ("image", "queries", "embed_act")))


def make_causal(
    rngs: nnx.Rngs, c: CausalConfig, features: int, outputs: int, dtype: str, init: str
) -> CausalTransformer | PooledPatches:
    """The module of `c.kind`, initialised by `init` (one of `INITS`)."""
    return (PooledPatches if c.kind == "pooled" else CausalTransformer)(rngs, c, features, outputs, dtype, init)
