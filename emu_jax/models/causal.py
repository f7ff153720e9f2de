"""Causal Transformer: image features [N, P + 1, Dv] -> causal embeddings [N, Q, Dl] in the LLM's width.

A T5-v1 decoder (12 blocks of 768 in the published model) whose inputs are Q learned queries: causal
self-attention with T5's relative-position bias, cross-attention to the image, ReLU feed-forward; scores are
not scaled by 1/sqrt(H). A linear map with bias then projects to the LLM's width.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from emu_jax.models.layers import (
    Array,
    Linear,
    RMSNorm,
    attention,
    dropout,
    merge_heads,
    parameter,
    scan_layers,
    split_heads,
    split_key,
    stack,
)
from emu_jax.train.mesh import constrain


@dataclasses.dataclass(frozen=True)
class CausalConfig:
    """Sizes of the Causal Transformer. T5's heads need not fill the width: `head_dim` is its own field."""

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


def relative_buckets(length: int, buckets: int, max_distance: int) -> np.ndarray:
    """T5's unidirectional buckets [length, length] for (query, key): exact up to buckets/2, then logarithmic.

    With buckets=4, max_distance=8 and length=5 (keys after the query fall into bucket 0 and are masked):

        0 0 0 0 0
        1 0 0 0 0
        2 1 0 0 0
        2 2 1 0 0
        3 2 2 1 0
    """
    distance = np.maximum(np.arange(length)[:, None] - np.arange(length)[None, :], 0)
    exact = buckets // 2
    ratio = np.log(np.maximum(distance, 1) / exact, dtype=np.float32) / np.log(max_distance / exact)
    far = exact + (ratio * (buckets - exact)).astype(np.int32)
    return np.where(distance < exact, distance, np.minimum(far, buckets - 1)).astype(np.int32)


class CausalAttention(nnx.Module):
    """T5 attention without biases or scaling: x [N, Q, W] attends to memory [N, T, M] -> [N, Q, W]."""

    def __init__(self, rngs: nnx.Rngs, c: CausalConfig, memory: int, dtype: str):
        inner = c.heads * c.head_dim
        self.q = Linear(rngs, c.width, inner, ("embed", "heads"), dtype, gain=c.head_dim**-0.5)
        self.k = Linear(rngs, memory, inner, ("embed", "heads"), dtype)
        self.v = Linear(rngs, memory, inner, ("embed", "heads"), dtype)
        self.o = Linear(rngs, inner, c.width, ("heads", "embed"), dtype)
        self.head_dim, self.dropout = c.head_dim, c.dropout

    def __call__(self, x: Array, memory: Array, bias: Array | None, mask: Array | None, key: Array | None) -> Array:
        q, k, v = (split_heads(y, self.head_dim) for y in (self.q(x), self.k(memory), self.v(memory)))
        mixed = attention(q, k, v, scale=1.0, bias=bias, mask=mask, dropout_rate=self.dropout, key=key)
        return self.o(merge_heads(mixed))


class CausalMLP(nnx.Module):
    """wi, ReLU, wo."""

    def __init__(self, rngs: nnx.Rngs, c: CausalConfig, dtype: str):
        self.wi = Linear(rngs, c.width, c.mlp_dim, ("embed", "mlp"), dtype)
        self.wo = Linear(rngs, c.mlp_dim, c.width, ("mlp", "embed"), dtype)
        self.dropout = c.dropout

    def __call__(self, x: Array, key: Array | None) -> Array:
        return self.wo(dropout(jax.nn.relu(self.wi(x)), self.dropout, key))


class CausalBlock(nnx.Module):
    """Causal self-attention, cross-attention to the features, feed-forward; x [N, Q, W]."""

    def __init__(self, rngs: nnx.Rngs, c: CausalConfig, memory: int, dtype: str):
        self.self_norm = RMSNorm(c.width, c.norm_eps, dtype)
        self.self_attn = CausalAttention(rngs, c, c.width, dtype)
        self.cross_norm = RMSNorm(c.width, c.norm_eps, dtype)
        self.cross_attn = CausalAttention(rngs, c, memory, dtype)
        self.mlp_norm = RMSNorm(c.width, c.norm_eps, dtype)
        self.mlp = CausalMLP(rngs, c, dtype)
        self.dropout = c.dropout

    def __call__(self, x: Array, *, features: Array, bias: Array, mask: Array, key: Array | None = None) -> Array:
        keys = split_key(key, 6)
        x = constrain(x, ("image", "queries", "embed_act"))
        y = self.self_norm(x)
        x = x + dropout(self.self_attn(y, y, bias, mask, keys[0]), self.dropout, keys[1])
        y = self.cross_attn(self.cross_norm(x), features, None, None, keys[2])
        x = x + dropout(y, self.dropout, keys[3])
        return x + dropout(self.mlp(self.mlp_norm(x), keys[4]), self.dropout, keys[5])


class CausalTransformer(nnx.Module):
    """Features [N, P+1, Dv] -> causal embeddings [N, Q, Dl]."""

    def __init__(self, rngs: nnx.Rngs, c: CausalConfig, features: int, outputs: int, dtype: str):
        self.queries = parameter(rngs, (c.queries, c.width), ("queries", "embed"), dtype, std=1.0)
        # Owned by block 0 in the checkpoint and shared by the self-attention of every block.
        self.relative_bias = parameter(rngs, (c.buckets, c.heads), ("buckets", "heads"), dtype, std=c.width**-0.5)
        self.blocks = stack(lambda rngs: CausalBlock(rngs, c, features, dtype), c.layers, rngs)
        self.final_norm = RMSNorm(c.width, c.norm_eps, dtype)
        self.projection = Linear(rngs, c.width, outputs, ("embed", "mlp"), dtype, bias=True)
        self.config = c

    def __call__(
        self, features: Array, *, remat: str = "none", unroll: bool = False, key: Array | None = None
    ) -> Array:
        c = self.config
        keys = split_key(key, 3)
        buckets = relative_buckets(c.queries, c.buckets, c.max_distance)  # [Q, Q]
        bias = self.relative_bias[...].astype(jnp.float32)[buckets].transpose(2, 0, 1)[None]  # [1, N, Q, Q]
        mask = np.tril(np.ones((c.queries, c.queries), bool))[None, None]
        queries = self.queries[...].astype(features.dtype)
        x = jnp.broadcast_to(queries, (features.shape[0], *queries.shape))  # [N, Q, W]
        x = dropout(x, c.dropout, keys[0])
        x = scan_layers(
            self.blocks, x, remat=remat, unroll=unroll, key=keys[1], features=features, bias=bias, mask=mask
        )
        x = dropout(self.final_norm(x), c.dropout, keys[2])
        return self.projection(x)  # [N, Q, Dl]
