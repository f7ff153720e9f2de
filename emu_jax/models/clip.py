"""Stable Diffusion's safety checker: CLIP's vision tower, and concepts that flag images with a similar embedding.

    pixels [B, size, size, 3] normalised -> embeddings [B, E] -> flagged bool [B]

Modules are named after the keys of the published files (`checkpoints/convert/diffusers.py`).
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Bool, Float

from emu_jax.errors import UserError
from emu_jax.models import parameters
from emu_jax.models.layers import Array, LayerNorm, Linear, attention, constant, merge_heads, parameter, split_heads
from emu_jax.models.parameters import Params

SPECIAL_CARE = 0.01  # decrease of all thresholds for an image close to a special concept


@dataclasses.dataclass(frozen=True)
class ClipConfig:
    """Sizes of CLIP's vision tower and of the checker; the defaults are ViT-L/14's."""

    image_size: int = 224
    patch_size: int = 14
    width: int = 1024
    layers: int = 24
    heads: int = 16
    mlp_dim: int = 4096
    embedding_dim: int = 768
    concepts: int = 17
    special_concepts: int = 3
    norm_eps: float = 1e-5

    def __post_init__(self):
        if self.width % self.heads or self.image_size % self.patch_size:
            raise UserError(
                f"safety checker: width={self.width} must divide by heads={self.heads}, and "
                f"image_size={self.image_size} by patch_size={self.patch_size}"
            )


def quick_gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """x * sigmoid(1.702 x), the GELU that CLIP was trained with."""
    return x * jax.nn.sigmoid(1.702 * x)


class ClipAttention(nnx.Module):
    """Self-attention with biases."""

    q_proj: Linear
    k_proj: Linear
    v_proj: Linear
    out_proj: Linear

    def __init__(self, rngs: nnx.Rngs, c: ClipConfig):
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            setattr(self, name, Linear(rngs, c.width, c.width, ("embed", "heads"), "float32", bias=True))
        self.head_dim = c.width // c.heads

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        q, k, v = (split_heads(y, self.head_dim) for y in (self.q_proj(x), self.k_proj(x), self.v_proj(x)))
        return self.out_proj(merge_heads(attention(q, k, v, scale=self.head_dim**-0.5)))


class ClipMLP(nnx.Module):
    """fc1, quick GELU, fc2."""

    def __init__(self, rngs: nnx.Rngs, c: ClipConfig):
        self.fc1 = Linear(rngs, c.width, c.mlp_dim, ("embed", "mlp"), "float32", bias=True)
        self.fc2 = Linear(rngs, c.mlp_dim, c.width, ("mlp", "embed"), "float32", bias=True)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return self.fc2(quick_gelu(self.fc1(x)))


class ClipBlock(nnx.Module):
    """x + attn(norm1(x)), then x + mlp(norm2(x))."""

    def __init__(self, rngs: nnx.Rngs, c: ClipConfig):
        self.layer_norm1 = LayerNorm(c.width, c.norm_eps, "float32")
        self.self_attn = ClipAttention(rngs, c)
        self.layer_norm2 = LayerNorm(c.width, c.norm_eps, "float32")
        self.mlp = ClipMLP(rngs, c)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class ClipVision(nnx.Module):
    """Normalised pixels -> pooled features."""

    def __init__(self, rngs: nnx.Rngs, c: ClipConfig):
        p, patches = c.patch_size, (c.image_size // c.patch_size) ** 2
        self.class_embedding = parameter(rngs, (c.width,), ("embed",), "float32", std=0.02)
        self.position_embedding = parameter(rngs, (patches + 1, c.width), ("patches", "embed"), "float32", std=0.02)
        self.patch_kernel = parameter(
            rngs, (p, p, 3, c.width), ("pixels", "pixels", "pixels", "embed"), "float32", std=0.02
        )
        self.pre_norm = LayerNorm(c.width, c.norm_eps, "float32")
        self.layers = nnx.Dict({str(i): ClipBlock(rngs, c) for i in range(c.layers)})
        self.post_norm = LayerNorm(c.width, c.norm_eps, "float32")

    def __call__(self, pixels: Float[Array, "B size size 3"]) -> Float[Array, "B D"]:
        kernel = self.patch_kernel[...]
        p, width = kernel.shape[0], kernel.shape[-1]
        patches = rearrange(pixels, "n (h p) (w q) c -> n (h w) (p q c)", p=p, q=p)  # [B, P, p*p*3]
        x = patches @ kernel.reshape(-1, width)  # [B, P, D]
        cls = jnp.broadcast_to(self.class_embedding[...], (x.shape[0], 1, width))
        x = self.pre_norm(jnp.concatenate([cls, x], axis=1) + self.position_embedding[...])  # [B, P+1, D]
        for block in self.layers.values():
            x = block(x)
        return self.post_norm(x[:, 0])


class SafetyChecker(nnx.Module):
    """CLIP, its projection, and concept embeddings [K, E] with their thresholds [K]."""

    concept_embeds: nnx.Variable
    concept_embeds_weights: nnx.Variable
    special_care_embeds: nnx.Variable
    special_care_embeds_weights: nnx.Variable

    def __init__(self, rngs: nnx.Rngs, c: ClipConfig):
        self.vision = ClipVision(rngs, c)
        self.visual_projection = Linear(rngs, c.width, c.embedding_dim, ("embed", "mlp"), "float32")
        for name, count in (("concept", c.concepts), ("special_care", c.special_concepts)):
            embeddings = parameter(rngs, (count, c.embedding_dim), ("queries", "embed"), "float32", std=1.0)
            setattr(self, f"{name}_embeds", embeddings)
            setattr(self, f"{name}_embeds_weights", constant(1.0, (count,), ("queries",), "float32"))

    def __call__(self, pixels: Float[Array, "B size size 3"]) -> Bool[Array, " B"]:
        """Whether each image, of normalised pixels, is flagged."""
        embedding = _unit(self.visual_projection(self.vision(pixels)))  # [B, E]
        special = embedding @ _unit(self.special_care_embeds[...]).T - self.special_care_embeds_weights[...]
        close = (_rounded(special) > 0).any(1, keepdims=True)  # [B, 1]
        concept = embedding @ _unit(self.concept_embeds[...]).T - self.concept_embeds_weights[...]
        return (_rounded(concept + SPECIAL_CARE * close) > 0).any(1)


def _unit(x: Array) -> Array:
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def _rounded(x: Array) -> Array:
    """Rounded to three digits, as in the published checker."""
    return jnp.round(x, 3)


def abstract(config: ClipConfig) -> Params:
    """The parameters' shapes and dtypes (`parameters.abstract`)."""
    return parameters.abstract(SafetyChecker, config)


@functools.partial(jax.jit, static_argnames="config")
def flagged(params: Params, pixels: Float[Array, "B size size 3"], *, config: ClipConfig) -> Bool[Array, " B"]:
    """Whether each image, of normalised pixels, is flagged."""
    return parameters.bind(SafetyChecker, config, params)(pixels)
