"""EVA-CLIP vision encoder: normalised pixels [I, height, width, 3] -> features [I, P + 1, D] of all patches and CLS.

EVA01-CLIP-g/14 as Emu uses it: pre-norm blocks, exact GELU, biases of queries and values but not of keys, learned
absolute positions, a CLS token, no final norm (the reference takes the tokens before it).
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float

from emu_jax.errors import UserError
from emu_jax.models.layers import (
    Array,
    LayerNorm,
    Linear,
    add,
    attention,
    check_remat,
    constant,
    dropout,
    gelu,
    merge_heads,
    parameter,
    repeat,
    scan_layers,
    split_heads,
    split_key,
    stack,
)
from emu_jax.sharding import with_logical_constraint


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """Sizes of the vision encoder.

    Attributes:
      drop_path: Probability of dropping a residual branch, in every layer.
      remat: What is saved of a block for the backward pass (`layers.REMAT_POLICIES`).
    """

    image_size: int
    patch_size: int
    width: int
    layers: int
    heads: int
    mlp_dim: int
    norm_eps: float = 1e-6
    drop_path: float = 0.0
    remat: str = "none"

    def __post_init__(self):
        check_remat("model.vision", self.remat)
        if self.image_size % self.patch_size:
            raise UserError(
                f"model.vision.image_size={self.image_size} is not a multiple of "
                f"model.vision.patch_size={self.patch_size}; choose sizes that divide"
            )
        if self.width % self.heads:
            raise UserError(f"model.vision.width={self.width} does not divide by model.vision.heads={self.heads}")

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def patches(self) -> int:
        """P, the number of patches of an image without CLS."""
        return (self.image_size // self.patch_size) ** 2


class VisionAttention(nnx.Module):
    """Self-attention with one fused qkv kernel [D, 3D]; only q and v have biases."""

    def __init__(self, rngs: nnx.Rngs, c: VisionConfig, depth_gain: float, dtype: str):
        self.qkv = Linear(rngs, c.width, 3 * c.width, ("embed", "heads"), dtype)
        self.q_bias = constant(0.0, (c.width,), ("heads",), dtype)
        self.v_bias = constant(0.0, (c.width,), ("heads",), dtype)
        self.proj = Linear(rngs, c.width, c.width, ("heads", "embed"), dtype, bias=True, gain=depth_gain)
        self.head_dim = c.head_dim

    def __call__(self, x: Float[Array, "I T D"]) -> Float[Array, "I T D"]:
        bias = jnp.concatenate([self.q_bias[...], jnp.zeros_like(self.q_bias[...]), self.v_bias[...]])
        qkv = checkpoint_name(add(self.qkv(x), bias, float32_gradients=self.qkv.float32_gradients), "qkv")  # [I, T, 3D]
        q, k, v = (split_heads(y, self.head_dim) for y in jnp.split(qkv, 3, axis=-1))
        mixed = checkpoint_name(attention(q, k, v, scale=self.head_dim**-0.5), "attention")
        return self.proj(merge_heads(mixed))


class VisionMLP(nnx.Module):
    """fc1, exact GELU, fc2."""

    def __init__(self, rngs: nnx.Rngs, c: VisionConfig, depth_gain: float, dtype: str):
        self.fc1 = Linear(rngs, c.width, c.mlp_dim, ("embed", "mlp"), dtype, bias=True)
        self.fc2 = Linear(rngs, c.mlp_dim, c.width, ("mlp", "embed"), dtype, bias=True, gain=depth_gain)

    def __call__(self, x: Float[Array, "I T D"]) -> Float[Array, "I T D"]:
        return self.fc2(gelu(self.fc1(x)))


class VisionBlock(nnx.Module):
    """x + attn(norm1(x)), then x + mlp(norm2(x))."""

    def __init__(self, rngs: nnx.Rngs, c: VisionConfig, dtype: str):
        # 2 L branches add up in the residual stream. EVA scales a layer by the branches before it; stacked layers share
        # one scale.
        depth_gain = (2.0 * c.layers) ** -0.5
        self.norm1 = LayerNorm(c.width, c.norm_eps, dtype)
        self.attn = VisionAttention(rngs, c, depth_gain, dtype)
        self.norm2 = LayerNorm(c.width, c.norm_eps, dtype)
        self.mlp = VisionMLP(rngs, c, depth_gain, dtype)
        self.drop_path = c.drop_path

    def __call__(self, x: Float[Array, "I T D"], *, key: Array | None = None) -> Float[Array, "I T D"]:
        key_attn, key_mlp = split_key(key, 2)
        x = with_logical_constraint(x, ("image", "patches", "embed_act"))
        x = x + dropout(self.attn(self.norm1(x)), self.drop_path, key_attn, per_sample=True)
        return x + dropout(self.mlp(self.norm2(x)), self.drop_path, key_mlp, per_sample=True)


class VisionEncoder(nnx.Module):
    """Normalised pixels -> features of T = P + 1 tokens; token 0 is CLS."""

    def __init__(self, rngs: nnx.Rngs, c: VisionConfig, dtype: str):
        self.cls_token = parameter(rngs, (1, c.width), ("patches", "embed"), dtype, std=0.02)
        self.pos_embed = parameter(rngs, (c.patches + 1, c.width), ("patches", "embed"), dtype, std=c.width**-0.5)
        self.patch_embed = Linear(rngs, c.patch_size**2 * 3, c.width, ("pixels", "embed"), dtype, bias=True)
        self.blocks = stack(lambda rngs: VisionBlock(rngs, c, dtype), c.layers, rngs)
        self.config = c
        self.float32_gradients = False

    def __call__(
        self,
        pixels: Float[Array, "I height width 3"],
        *,
        unroll: bool = False,
        key: Array | None = None,
    ) -> Float[Array, "I T D"]:
        p = self.config.patch_size
        patches = rearrange(pixels, "n (h p) (w q) c -> n (h w) (p q c)", p=p, q=p)  # [I, P, p*p*3]
        x = self.patch_embed(patches)  # [I, P, D]
        options = {"float32_gradients": self.float32_gradients}
        cls = repeat(self.cls_token[...], (x.shape[0], 1, x.shape[-1]), x.dtype, **options)
        x = add(jnp.concatenate([cls, x], axis=1), self.pos_embed[...], **options)  # [I, P+1, D]
        return scan_layers(self.blocks, x, remat=self.config.remat, unroll=unroll, key=key)
