"""The visual decoder's U-Net: Stable Diffusion 1.5's, any width, conditioned on Emu's visual embeddings.

    latents [B, h, w, 4] + timesteps [B] + condition [B, Q, D] -> predicted noise [B, h, w, 4]

    conv_in ─ down 0 ─ down 1 ─ down 2 ─ down 3 ─ mid ─ up 0 ─ up 1 ─ up 2 ─ up 3 ─ conv_out
                 └────────┴─────────┴────────┴── skips ──┴───────┴───────┴──────┘

Modules are named after the keys of the published files (`checkpoints/convert/diffusers.py`). Channels are the last
axis, which suits matrix units.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float, Int

from emu_jax.errors import UserError, build
from emu_jax.models import parameters
from emu_jax.models.layers import (
    REMAT_POLICIES,
    Array,
    LayerNorm,
    Linear,
    attention,
    check_compute,
    check_remat,
    gelu,
    merge_heads,
    split_heads,
)
from emu_jax.models.parameters import Params
from emu_jax.models.resnet import Conv, Downsample, GroupNorm, ResnetBlock, Upsample
from emu_jax.models.splash import splash_attention, why_unsupported
from emu_jax.sharding import platform, with_logical_constraint

LONG_ATTENTION = 1024  # number of queries from which attention is fused, so that no scores are stored in memory
TRANSFORMER_NORM_EPS = 1e-6  # epsilon of the group norm before a transformer, a constant in the published code


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """The U-Net's sizes; hashable, so that jitted functions take it as a static argument.

    Attributes:
      latent_channels: Channels of the latents and of the predicted noise.
      block_channels: Width at each resolution; each resolution is half the one before.
      attention_blocks: Whether each resolution has transformers.
      layers_per_block: Residual blocks at each resolution on the way down; one more on the way up.
      heads: Heads of every attention (`attention_head_dim` in diffusers' SD-1.5 files).
      condition_dim: D, the width of the condition.
      remat: What is saved of a block for the backward pass (`layers.REMAT_POLICIES`).
    """

    latent_channels: int = 4
    block_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    attention_blocks: tuple[bool, ...] = (True, True, True, False)
    layers_per_block: int = 2
    heads: int = 8
    condition_dim: int = 5120
    groups: int = 32
    norm_eps: float = 1e-5
    dtype: str = "float32"
    param_dtype: str = "float32"
    remat: str = "none"

    def __post_init__(self):
        if len(self.block_channels) != len(self.attention_blocks):
            raise UserError(
                f"unet.block_channels has {len(self.block_channels)} blocks, unet.attention_blocks "
                f"{len(self.attention_blocks)}; expected one entry a block in both"
            )
        for width in self.block_channels:
            if width % self.groups or width % self.heads:
                raise UserError(
                    f"unet.block_channels has {width}, which does not divide by unet.groups={self.groups} and "
                    f"unet.heads={self.heads}; choose widths that do"
                )
        check_compute("unet", self)
        check_remat("unet", self.remat)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> UNetConfig:
        """Builds and validates from `config.unet` (a ConfigDict or a plain dict)."""
        return build(cls, "unet", fields)


def time_features(timesteps: Int[Array, " B"] | Float[Array, " B"], width: int) -> Float[Array, "B width"]:
    """Sinusoids of the timesteps in float32: cosines first, as in the published model."""
    frequencies = jnp.exp(-math.log(10000.0) * jnp.arange(width // 2, dtype=jnp.float32) / (width // 2))
    angles = timesteps.astype(jnp.float32)[:, None] * frequencies  # [B, width/2]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class TimeEmbedding(nnx.Module):
    """linear_2(silu(linear_1(features)))."""

    def __init__(self, rngs: nnx.Rngs, width: int, outputs: int, dtype: str):
        self.linear_1 = Linear(rngs, width, outputs, ("embed", "mlp"), dtype, bias=True)
        self.linear_2 = Linear(rngs, outputs, outputs, ("embed", "mlp"), dtype, bias=True)

    def __call__(self, x: Float[Array, "B W"]) -> Float[Array, "B T"]:
        return self.linear_2(jax.nn.silu(self.linear_1(x)))


class UNetAttention(nnx.Module):
    """Attention of x to a memory; q, k, v have no biases."""

    def __init__(self, rngs: nnx.Rngs, width: int, memory: int, heads: int, dtype: str):
        self.to_q = Linear(rngs, width, width, ("embed", "heads"), dtype)
        self.to_k = Linear(rngs, memory, width, ("embed", "heads"), dtype)
        self.to_v = Linear(rngs, memory, width, ("embed", "heads"), dtype)
        self.to_out = Linear(rngs, width, width, ("heads", "embed"), dtype, bias=True, gain=0.3)
        self.head_dim = width // heads

    def __call__(self, x: Float[Array, "B S C"], memory: Float[Array, "B T M"]) -> Float[Array, "B S C"]:
        q, k, v = (split_heads(y, self.head_dim) for y in (self.to_q(x), self.to_k(memory), self.to_v(memory)))
        mix = fused_attention if min(q.shape[2], k.shape[2]) >= LONG_ATTENTION else attention
        return self.to_out(merge_heads(mix(q, k, v, scale=self.head_dim**-0.5)))


def fused_attention(
    q: Float[Array, "B N S H"], k: Float[Array, "B N T H"], v: Float[Array, "B N T H"], *, scale: float
) -> Float[Array, "B N S H"]:
    """`layers.attention` for long sequences: a fused kernel on TPUs and GPUs, otherwise block by block."""

    def cudnn(q: Array, k: Array, v: Array) -> Array:
        if q.dtype == jnp.float32 or q.shape[-1] % 8:
            return blockwise(q, k, v)
        q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))  # [B, S, N, H]
        return jax.nn.dot_product_attention(q, k, v, scale=scale, implementation="cudnn").swapaxes(1, 2)

    def blockwise(q: Array, k: Array, v: Array) -> Array:
        size = max(n for n in range(1, LONG_ATTENTION // 4 + 1) if q.shape[2] % n == 0)
        blocks = q.reshape(*q.shape[:2], -1, size, q.shape[3])
        mixed = jax.lax.map(
            jax.checkpoint(lambda block: attention(block, k, v, scale=scale)), jnp.moveaxis(blocks, 2, 0)
        )
        return jnp.moveaxis(mixed, 0, 2).reshape(q.shape)

    if platform() == "tpu" and why_unsupported(q.shape[2], k.shape[2]) is None:
        return splash_attention(q, k, v, scale=scale)
    if platform() != "gpu":  # without cuDNN the GPU kernel cannot even be traced
        return blockwise(q, k, v)
    return jax.lax.platform_dependent(q, k, v, cuda=cudnn, default=blockwise)


class GatedMLP(nnx.Module):
    """GEGLU: out(value * gelu(gate)) with value, gate = split(proj(x))."""

    def __init__(self, rngs: nnx.Rngs, width: int, dtype: str):
        self.proj = Linear(rngs, width, 8 * width, ("embed", "mlp"), dtype, bias=True)
        self.out = Linear(rngs, 4 * width, width, ("mlp", "embed"), dtype, bias=True, gain=0.3)

    def __call__(self, x: Float[Array, "B S C"]) -> Float[Array, "B S C"]:
        value, gate = jnp.split(self.proj(x), 2, axis=-1)
        return self.out(value * gelu(gate))


class TransformerBlock(nnx.Module):
    """Self-attention, cross-attention to the condition, gated MLP."""

    def __init__(self, rngs: nnx.Rngs, width: int, c: UNetConfig):
        self.norm1 = LayerNorm(width, c.norm_eps, c.param_dtype)
        self.attn1 = UNetAttention(rngs, width, width, c.heads, c.param_dtype)
        self.norm2 = LayerNorm(width, c.norm_eps, c.param_dtype)
        self.attn2 = UNetAttention(rngs, width, c.condition_dim, c.heads, c.param_dtype)
        self.norm3 = LayerNorm(width, c.norm_eps, c.param_dtype)
        self.ff = GatedMLP(rngs, width, c.param_dtype)

    def __call__(self, x: Float[Array, "B S C"], condition: Float[Array, "B Q D"]) -> Float[Array, "B S C"]:
        y = self.norm1(x)
        x = x + self.attn1(y, y)
        x = x + self.attn2(self.norm2(x), condition)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nnx.Module):
    """A residual transformer block over the positions of a feature map."""

    def __init__(self, rngs: nnx.Rngs, width: int, c: UNetConfig):
        self.norm = GroupNorm(width, c.groups, TRANSFORMER_NORM_EPS, c.param_dtype)
        self.proj_in = Linear(rngs, width, width, ("embed", "mlp"), c.param_dtype, bias=True)
        self.block = TransformerBlock(rngs, width, c)
        self.proj_out = Linear(rngs, width, width, ("mlp", "embed"), c.param_dtype, bias=True, gain=1e-2)

    def __call__(self, x: Float[Array, "B h w C"], condition: Float[Array, "B Q D"]) -> Float[Array, "B h w C"]:
        y = self.proj_in(self.norm(x)).reshape(x.shape[0], -1, x.shape[-1])  # [B, h*w, C]
        y = with_logical_constraint(y, ("image", None, "embed_act"))
        return x + self.proj_out(self.block(y, condition)).reshape(x.shape)


class UNetStage(nnx.Module):
    """One resolution: residual blocks, each followed by a transformer where the resolution has them."""

    downsamplers: nnx.Dict  # only on the way down, and not in the last stage
    upsamplers: nnx.Dict  # only on the way up, and not in the last stage

    def __init__(self, rngs: nnx.Rngs, widths: list[int], outputs: int, transformers: bool, c: UNetConfig):
        time = 4 * c.block_channels[0]
        resnets = (ResnetBlock(rngs, inputs, outputs, c, time=time) for inputs in widths)
        self.resnets = nnx.Dict({str(i): block for i, block in enumerate(resnets)})
        if transformers:
            self.attentions = nnx.Dict({str(i): SpatialTransformer(rngs, outputs, c) for i in range(len(widths))})
        self.remat = c.remat

    def layer(
        self, index: int, x: Float[Array, "B h w C"], time: Float[Array, "B T"], condition: Float[Array, "B Q D"]
    ) -> Float[Array, "B h w O"]:
        """Residual block `index` and its transformer."""

        def run(modules: tuple, x: Array, time: Array, condition: Array) -> Array:
            resnet, transformer = modules
            x = resnet(x, time)
            return x if transformer is None else transformer(x, condition)

        transformer = self.attentions[str(index)] if hasattr(self, "attentions") else None
        if REMAT_POLICIES[self.remat] is not None:
            run = jax.checkpoint(run, policy=REMAT_POLICIES[self.remat])
        return run((self.resnets[str(index)], transformer), x, time, condition)


class UNetMiddle(nnx.Module):
    """resnet, transformer, resnet at the lowest resolution."""

    def __init__(self, rngs: nnx.Rngs, width: int, c: UNetConfig):
        time = 4 * c.block_channels[0]
        self.resnets = nnx.Dict({name: ResnetBlock(rngs, width, width, c, time=time) for name in ("0", "1")})
        self.attentions = nnx.Dict({"0": SpatialTransformer(rngs, width, c)})

    def __call__(
        self, x: Float[Array, "B h w C"], time: Float[Array, "B T"], condition: Float[Array, "B Q D"]
    ) -> Float[Array, "B h w C"]:
        x = self.attentions["0"](self.resnets["0"](x, time), condition)
        return self.resnets["1"](x, time)


class UNet(nnx.Module):
    """Predicts the noise in latents; the module's docstring shows its layers."""

    def __init__(self, rngs: nnx.Rngs, c: UNetConfig):
        widths, dtype, last = c.block_channels, c.param_dtype, len(c.block_channels) - 1
        self.conv_in = Conv(rngs, c.latent_channels, widths[0], dtype)
        self.time_embedding = TimeEmbedding(rngs, widths[0], 4 * widths[0], dtype)
        skips = [widths[0]]  # widths of the skip connections
        down, width = {}, widths[0]
        for i, outputs in enumerate(widths):
            stage = UNetStage(rngs, [width] + [outputs] * (c.layers_per_block - 1), outputs, c.attention_blocks[i], c)
            skips += [outputs] * c.layers_per_block
            if i < last:
                stage.downsamplers = nnx.Dict({"0": Downsample(rngs, outputs, dtype, padding=(1, 1))})
                skips.append(outputs)
            down[str(i)], width = stage, outputs
        self.down_blocks = nnx.Dict(down)
        self.mid_block = UNetMiddle(rngs, width, c)
        up = {}
        for i, outputs in enumerate(reversed(widths)):
            inputs = []
            for _ in range(c.layers_per_block + 1):
                inputs.append(width + skips.pop())
                width = outputs
            stage = UNetStage(rngs, inputs, outputs, c.attention_blocks[last - i], c)
            if i < last:
                stage.upsamplers = nnx.Dict({"0": Upsample(rngs, outputs, dtype)})
            up[str(i)] = stage
        self.up_blocks = nnx.Dict(up)
        self.conv_norm_out = GroupNorm(widths[0], c.groups, c.norm_eps, dtype)
        self.conv_out = Conv(rngs, widths[0], c.latent_channels, dtype, gain=1e-2)
        self.config = c

    def __call__(
        self,
        latents: Float[Array, "B h w C"],
        timesteps: Int[Array, " B"] | Float[Array, " B"],
        condition: Float[Array, "B Q D"],
    ) -> Float[Array, "B h w C"]:
        """The predicted noise, float32."""
        c = self.config
        condition = condition.astype(c.dtype)
        time = self.time_embedding(time_features(timesteps, c.block_channels[0]).astype(c.dtype))  # [B, T]
        x = self.conv_in(latents.astype(c.dtype))
        skips = [x]
        for stage in self.down_blocks.values():
            for index in range(c.layers_per_block):
                x = stage.layer(index, x, time, condition)
                skips.append(x)
            if hasattr(stage, "downsamplers"):
                x = stage.downsamplers["0"](x)
                skips.append(x)
        x = self.mid_block(x, time, condition)
        for stage in self.up_blocks.values():
            for index in range(c.layers_per_block + 1):
                x = stage.layer(index, jnp.concatenate([x, skips.pop()], axis=-1), time, condition)
            if hasattr(stage, "upsamplers"):
                x = stage.upsamplers["0"](x, skips[-1].shape[1:3])
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x))).astype(jnp.float32)


def init(config: UNetConfig, key: Array) -> Params:
    """Initial parameters (`parameters.init`)."""
    return parameters.init(UNet, config, key)


def abstract(config: UNetConfig) -> Params:
    """The parameters' shapes and dtypes (`parameters.abstract`)."""
    return parameters.abstract(UNet, config)


def logical_axes(config: UNetConfig) -> dict[str, Any]:
    """The parameters' logical axes (`parameters.logical_axes`)."""
    return parameters.logical_axes(UNet, config)


def apply(
    params: Params,
    latents: Float[Array, "B h w C"],
    timesteps: Int[Array, " B"] | Float[Array, " B"],
    condition: Float[Array, "B Q D"],
    *,
    config: UNetConfig,
) -> Float[Array, "B h w C"]:
    """The noise that the U-Net with these parameters predicts, float32."""
    return parameters.bind(UNet, config, params)(latents, timesteps, condition)
