"""LLaMA with two heads: embeddings [B, S, D] -> hidden states [B, S, D] -> next token and next visual embedding.

Pre-norm blocks of RoPE attention and SwiGLU, RMSNorm, no biases. Rows hold several packed documents: a position
attends only to earlier positions of its own segment. `decode` continues from a KV cache.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Bool, Float, Int

from emu_jax.errors import UserError, nearest
from emu_jax.models.heads.head import VisualHead
from emu_jax.models.layers import (
    Array,
    Linear,
    RMSNorm,
    apply_rope,
    attention,
    check_remat,
    merge_heads,
    parameter,
    rope_tables,
    scan_layers,
    split_key,
    stack,
)
from emu_jax.models.packed_attention import KERNELS, packed_attention
from emu_jax.models.quantise import KINDS
from emu_jax.sharding import platform, with_logical_constraint

ROPE_DTYPES = ("float32", "bfloat16")
# A block's linear maps, in the order of computation.
PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Sizes of the language model.

    Attributes:
      heads, kv_heads: Heads of queries, and heads of keys and values, each of which serves `heads / kv_heads`
        neighbouring heads of queries (grouped-query attention); 0 means as many as heads of queries.
      rope_dtype: Dtype that RoPE's sines and cosines are rounded to, "float32" or "bfloat16"; they are used in float32.
        The reference casts its language model, these tables included, to bfloat16 before it trains.
      context: Length of the longest sequence that generation accepts.
      quantised: "int8" or "int4" stores the blocks' kernels as integers with scales (`quantise.py`); then only adapters
        are trainable. "" keeps them in floating point.
      lora_rank, lora_alpha: Rank and alpha of the LoRA adapters (`lora.py`); rank 0 means no adapters.
      lora_dropout: Dropout rate of the adapters' inputs in training.
      lora_targets: The projections with adapters, of `PROJECTIONS`; by default those of attention, as in the paper.
      attention: Attention kernel for packed rows (`packed_attention.py`); "auto" chooses by device.
      remat: What is saved of a block for the backward pass (`layers.REMAT_POLICIES`).
    """

    vocab_size: int
    width: int
    layers: int
    heads: int
    mlp_dim: int
    kv_heads: int = 0
    norm_eps: float = 1e-6
    rope_base: float = 10000.0
    rope_dtype: str = "float32"
    context: int = 2048
    quantised: str = ""
    lora_rank: int = 0
    lora_alpha: float = 16.0
    lora_dropout: float = 0.0
    lora_targets: tuple[str, ...] = ("q", "k", "v", "o")
    attention: str = "auto"
    remat: str = "none"

    def __post_init__(self):
        check_remat("model.llama", self.remat)
        if self.width % self.heads or (self.width // self.heads) % 2:
            raise UserError(
                f"model.llama.width={self.width} must be model.llama.heads={self.heads} times an even "
                "head width (RoPE rotates pairs)"
            )
        if self.kv_heads < 0 or (self.kv_heads and self.heads % self.kv_heads):
            raise UserError(
                f"model.llama.kv_heads={self.kv_heads} must divide model.llama.heads={self.heads}, or be 0, which "
                "means as many"
            )
        object.__setattr__(self, "kv_heads", self.kv_heads or self.heads)
        if self.rope_dtype not in ROPE_DTYPES:
            raise UserError(
                f"model.llama.rope_dtype={self.rope_dtype!r} is unknown; choose one of {', '.join(ROPE_DTYPES)}"
            )
        if self.quantised not in ("", *KINDS):
            raise UserError(f"model.llama.quantised={self.quantised!r}; expected '' or one of {', '.join(KINDS)}")
        if self.lora_rank < 0:
            raise UserError(f"model.llama.lora_rank={self.lora_rank}; expected 0 (no adapters) or more")
        if not 0.0 <= self.lora_dropout < 1.0:
            raise UserError(f"model.llama.lora_dropout={self.lora_dropout}; expected 0 to below 1")
        self._check_targets()
        if self.attention not in KERNELS:
            raise UserError(f"model.llama.attention={self.attention!r} is unknown; choose one of {list(KERNELS)}")

    def _check_targets(self) -> None:
        targets, expected = self.lora_targets, f"expected some of {', '.join(PROJECTIONS)}, each once"
        if not isinstance(targets, tuple | list) or not targets or len(set(map(str, targets))) < len(targets):
            raise UserError(f"model.llama.lora_targets={targets!r}; {expected}, as in ('q', 'v')")
        for name in targets:
            if name not in PROJECTIONS:
                guess = nearest(str(name), PROJECTIONS)
                raise UserError(
                    f"model.llama.lora_targets: {name!r} is no projection; did you mean {guess}? {expected}"
                )
        object.__setattr__(self, "lora_targets", tuple(targets))  # JSON and configs give lists

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    def projection_sizes(self) -> dict[str, tuple[int, int]]:
        """Input and output width of each of `PROJECTIONS`."""
        square, keys = (self.width, self.width), (self.width, self.kv_heads * self.head_dim)
        inner, outer = (self.width, self.mlp_dim), (self.mlp_dim, self.width)
        return dict(zip(PROJECTIONS, (square, keys, keys, square, inner, inner, outer), strict=True))

    def adapter(self, name: str) -> tuple[int, float, float] | None:
        """Rank, alpha and dropout of a projection's adapter, if it has one."""
        has = self.lora_rank > 0 and name in self.lora_targets
        return (self.lora_rank, self.lora_alpha, self.lora_dropout) if has else None


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class KVCache:
    """Keys and values with a capacity of C slots a row; slots [0, index) are filled, `valid` is False at padding.

    With one index for each row, rows have different lengths and grow by one position at a time.
    """

    k: Float[Array, "L B K C H"]
    v: Float[Array, "L B K C H"]
    valid: Bool[Array, "B C"]
    index: Int[Array, ""] | Int[Array, " B"]


class LlamaAttention(nnx.Module):
    """RoPE attention with separate q, k, v, o kernels."""

    def __init__(self, rngs: nnx.Rngs, c: LlamaConfig, dtype: str):
        self.q = Linear(rngs, c.width, c.width, ("embed", "heads"), dtype, adapter=c.adapter("q"))
        keys = c.kv_heads * c.head_dim
        self.k = Linear(rngs, c.width, keys, ("embed", "heads"), dtype, adapter=c.adapter("k"))
        self.v = Linear(rngs, c.width, keys, ("embed", "heads"), dtype, adapter=c.adapter("v"))
        gain = (2.0 * c.layers) ** -0.5
        self.o = Linear(rngs, c.width, c.width, ("heads", "embed"), dtype, gain=gain, adapter=c.adapter("o"))
        self.head_dim = c.head_dim

    def project(
        self,
        x: Float[Array, "B S D"],
        cos: Float[Array, "B S H"],
        sin: Float[Array, "B S H"],
        keys: Sequence[Array | None] = (None, None, None),
    ) -> tuple[Float[Array, "B N S H"], Float[Array, "B K S H"], Float[Array, "B K S H"]]:
        """Rotated q, rotated k, and v."""
        q, k, v = self.q(x, keys[0]), self.k(x, keys[1]), self.v(x, keys[2])
        if x.shape[1] == 1:
            # Otherwise the TPU compiler multiplies by kernels split into heads, and relays them out for every token.
            q, k, v = jax.lax.optimization_barrier((q, k, v))
        q, k, v = (y.reshape(*y.shape[:-1], -1, self.head_dim) for y in (q, k, v))
        heads = (apply_rope(q, cos, sin), apply_rope(k, cos, sin), v)  # [B, S, N, H], 2 x [B, S, K, H]
        return checkpoint_name(tuple(y.swapaxes(1, 2) for y in heads), "qkv")

    def attend(
        self,
        q: Float[Array, "B N T H"],
        k: Float[Array, "B K C H"],
        v: Float[Array, "B K C H"],
        mask: Bool[Array, "B 1 T C"],
    ) -> Float[Array, "B N T H"]:
        """Attention of T new positions to a cache."""
        length = q.shape[2]
        if length == 1 and platform() == "tpu":
            # The compiler multiplies a single query outside the matrix units and changes the cache's layout for that:
            # up to twice the traffic. Eight copies of the query cost nothing and read the cache in its own layout.
            q = jax.lax.optimization_barrier(jnp.broadcast_to(q, (*q.shape[:2], 8, q.shape[3])))
        return attention(q, k, v, scale=self.head_dim**-0.5, mask=mask)[:, :, :length]

    def merge(self, mixed: Float[Array, "B N S H"], key: Array | None = None) -> Float[Array, "B S D"]:
        """Output projection of all heads."""
        return self.o(merge_heads(mixed), key)


class LlamaMLP(nnx.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, rngs: nnx.Rngs, c: LlamaConfig, dtype: str):
        gain = (2.0 * c.layers) ** -0.5
        self.gate = Linear(rngs, c.width, c.mlp_dim, ("embed", "mlp"), dtype, adapter=c.adapter("gate"))
        self.up = Linear(rngs, c.width, c.mlp_dim, ("embed", "mlp"), dtype, adapter=c.adapter("up"))
        self.down = Linear(rngs, c.mlp_dim, c.width, ("mlp", "embed"), dtype, gain=gain, adapter=c.adapter("down"))

    def __call__(
        self, x: Float[Array, "B S D"], keys: Sequence[Array | None] = (None, None, None)
    ) -> Float[Array, "B S D"]:
        return self.down(jax.nn.silu(self.gate(x, keys[0])) * self.up(x, keys[1]), keys[2])


class LlamaBlock(nnx.Module):
    """x + attn(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, rngs: nnx.Rngs, c: LlamaConfig, dtype: str):
        self.attn_norm = RMSNorm(c.width, c.norm_eps, dtype)
        self.attn = LlamaAttention(rngs, c, c.quantised or dtype)
        self.mlp_norm = RMSNorm(c.width, c.norm_eps, dtype)
        self.mlp = LlamaMLP(rngs, c, c.quantised or dtype)

    def __call__(
        self,
        x: Float[Array, "B S D"],
        *,
        attend: Callable[[Array, Array, Array], Array],
        cos: Float[Array, "B S H"],
        sin: Float[Array, "B S H"],
        key: Array | None = None,
    ) -> Float[Array, "B S D"]:
        keys = split_key(key, len(PROJECTIONS))  # one for each projection, for the dropout before its adapter
        x = with_logical_constraint(x, ("batch", "sequence", "embed_act"))
        x = x + self.attn.merge(attend(*self.attn.project(self.attn_norm(x), cos, sin, keys[:3])), keys[3])
        return x + self.mlp(self.mlp_norm(x), keys[4:])

    def decode(
        self,
        x: Float[Array, "B T D"],
        k: Float[Array, "L B K C H"],
        v: Float[Array, "L B K C H"],
        layer: Int[Array, ""],
        index: Int[Array, ""] | Int[Array, " B"],
        mask: Bool[Array, "B 1 T R"],
        cos: Float[Array, "B T H"],
        sin: Float[Array, "B T H"],
    ) -> tuple[Float[Array, "B T D"], Float[Array, "L B K C H"], Float[Array, "L B K C H"]]:
        """x after the block, and the caches with slots index..index+T of `layer` set.

        The caches stay whole and are updated in place: slicing a layer out and stacking it back would copy all of it
        for every token. The block attends to the first R slots.
        """
        q, k_new, v_new = self.attn.project(self.attn_norm(x), cos, sin)  # [B, N, T, H], 2 x [B, K, T, H]
        if index.ndim:
            rows = jnp.arange(len(x))
            k = k.at[layer, rows, :, index].set(k_new[:, :, 0].astype(k.dtype))
            v = v.at[layer, rows, :, index].set(v_new[:, :, 0].astype(v.dtype))
        else:
            at = (layer, 0, 0, index, 0)
            k = jax.lax.dynamic_update_slice(k, k_new[None].astype(k.dtype), at)
            v = jax.lax.dynamic_update_slice(v, v_new[None].astype(v.dtype), at)
        reach = mask.shape[-1]
        k_layer, v_layer = (y[layer, :, :, :reach].astype(x.dtype) for y in (k, v))  # [B, K, R, H]
        x = x + self.attn.merge(self.attn.attend(q, k_layer, v_layer, mask))
        return x + self.mlp(self.mlp_norm(x)), k, v


class TokenEmbedding(nnx.Module):
    """Looks up the embeddings of token ids."""

    def __init__(self, rngs: nnx.Rngs, c: LlamaConfig, dtype: str):
        self.embedding = parameter(rngs, (c.vocab_size, c.width), ("vocab", "embed"), dtype, std=c.width**-0.5)

    def __call__(self, tokens: Int[Array, "*batch"]) -> Float[Array, "*batch D"]:
        return jnp.take(self.embedding[...], tokens, axis=0)


class Llama(nnx.Module):
    """Embeddings -> post-norm hidden states, with a token head and a visual head on them."""

    def __init__(self, rngs: nnx.Rngs, c: LlamaConfig, head: VisualHead, dtype: str, init: str):
        self.embed = TokenEmbedding(rngs, c, dtype)
        self.blocks = stack(lambda rngs: LlamaBlock(rngs, c, dtype), c.layers, rngs)
        self.final_norm = RMSNorm(c.width, c.norm_eps, dtype)
        self.lm_head = Linear(rngs, c.width, c.vocab_size, ("embed", "vocab"), dtype)
        self.visual_head = head.make(rngs, c.width, dtype, init)
        self.config = c

    def __call__(
        self,
        embeddings: Float[Array, "B S D"],
        positions: Int[Array, "B S"],
        segments: Int[Array, "B S"],
        *,
        unroll: bool = False,
        key: Array | None = None,
    ) -> Float[Array, "B S D"]:
        """Post-norm hidden states of packed rows. `key` is the randomness of the adapters' dropout; None means none."""
        c = self.config
        key = key if c.lora_rank and c.lora_dropout else None
        cos, sin = rope_tables(positions, embeddings.shape[1], c.head_dim, c.rope_base, c.rope_dtype)
        attend = packed_attention(segments, c.head_dim, c.attention)
        x = scan_layers(self.blocks, embeddings, remat=c.remat, unroll=unroll, key=key, attend=attend, cos=cos, sin=sin)
        return self.final_norm(x)

    def logits(self, hidden: Float[Array, "B *batch D"]) -> Float[Array, "B *batch V"]:
        """Logits from hidden states, sharded over the vocabulary under tensor parallelism."""
        return with_logical_constraint(
            self.lm_head(hidden), ("batch", *(None,) * (hidden.ndim - 2), "vocab"), uneven=True
        )

    def init_cache(self, batch: int, capacity: int, dtype: str) -> KVCache:
        """An empty cache with `capacity` slots for each of `batch` rows."""
        c = self.config
        shape = (c.layers, batch, c.kv_heads, capacity, c.head_dim)
        return KVCache(
            k=jnp.zeros(shape, dtype),
            v=jnp.zeros(shape, dtype),
            valid=jnp.zeros((batch, capacity), bool),
            index=jnp.zeros((), jnp.int32),
        )

    def decode(
        self,
        embeddings: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        cache: KVCache,
        valid: Bool[Array, "B T"] | None = None,
        mask: Bool[Array, "B T C"] | None = None,
        *,
        reach: int | None = None,
        unroll: int = 1,
    ) -> tuple[Float[Array, "B T D"], KVCache]:
        """Appends T positions to the cache and returns their post-norm hidden states.

        Args:
          embeddings: Inputs at the new positions.
          positions: RoPE positions.
          cache: Keys and values of the earlier positions; at least T slots must be free.
          valid: False at left padding (default: all True).
          mask: Which slots each position attends to (default: every valid slot up to its own). With a mask, the T
            positions need not be one sequence: beam search appends one token of each beam.
          reach: Number of leading slots to attend to (default: all); they must include the slots in use.
          unroll: Number of layers unrolled in the body of the scan over depth.
        """
        c = self.config
        batch, length, _ = embeddings.shape
        valid = jnp.ones((batch, length), bool) if valid is None else valid
        if cache.index.ndim:
            if length != 1:
                raise ValueError(f"embeddings: rows of different lengths grow by 1 position at a time, not by {length}")
            valid = cache.valid.at[jnp.arange(batch), cache.index].set(valid[:, 0])  # [B, C]
        else:
            valid = jax.lax.dynamic_update_slice(cache.valid, valid, (0, cache.index))  # [B, C]
        if mask is None:
            slots = jnp.arange(valid.shape[1])
            last = cache.index[..., None] + jnp.arange(length)  # [T] or [B, T]
            mask = (slots <= last[..., None]) & valid[:, None, :]  # [B, T, C]
        mask = mask[..., :reach]
        mask = mask[:, None]  # [B, 1, T, C]
        cos, sin = rope_tables(positions, valid.shape[1], c.head_dim, c.rope_base, c.rope_dtype)
        graph, params = nnx.split(self.blocks)

        def block(carry: tuple[Array, ...], layer: tuple[Any, Array]) -> tuple[tuple[Array, ...], None]:
            params, number = layer
            module: Any = nnx.merge(graph, params)
            return module.decode(*carry, number, cache.index, mask, cos, sin), None

        layers = jnp.arange(c.layers)
        carry: tuple[Array, ...] = (embeddings, cache.k, cache.v)
        x, k, v = jax.lax.scan(block, carry, (params, layers), unroll=unroll)[0]
        return self.final_norm(x), KVCache(k, v, valid, cache.index + length)
