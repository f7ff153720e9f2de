"""The visual decoder's VAE, Stable Diffusion's at any width: images [B, height, width, 3] <-> latents [B, h, w, C].

Images are in [-1, 1]. The encoder returns the mean and log-variance of a Gaussian. Diffusion works on a sample (or the
mean) times `scale`, and `decode` divides by it. Modules are named after the keys of the
published files (`checkpoints/convert/diffusers.py`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float, UInt8

from emu_jax.errors import UserError, build
from emu_jax.models import parameters
from emu_jax.models.layers import Array, Linear, attention, check_compute
from emu_jax.models.parameters import Params
from emu_jax.models.resnet import Conv, Downsample, GroupNorm, ResnetBlock, Upsample
from emu_jax.models.unet import LONG_ATTENTION, fused_attention


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """The VAE's sizes; hashable, so that jitted functions take it as a static argument.

    Attributes:
      block_channels: Width at each resolution; each resolution is half the one before.
      latent_channels: C, the channels of the latents.
      layers_per_block: Residual blocks at each resolution of the encoder; one more in the decoder.
      scale: Factor that brings the latents' variance to about 1.
    """

    block_channels: tuple[int, ...] = (128, 256, 512, 512)
    latent_channels: int = 4
    layers_per_block: int = 2
    groups: int = 32
    norm_eps: float = 1e-6
    scale: float = 0.18215
    dtype: str = "float32"
    param_dtype: str = "float32"

    def __post_init__(self):
        for width in self.block_channels:
            if width % self.groups:
                raise UserError(f"vae.block_channels has {width}, which does not divide by vae.groups={self.groups}")
        check_compute("vae", self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> VAEConfig:
        """Builds and validates from `config.vae` (a ConfigDict or a plain dict)."""
        return build(cls, "vae", fields)

    @property
    def reduction(self) -> int:
        """Pixels per latent, in height and in width."""
        return 2 ** (len(self.block_channels) - 1)


class VAEAttention(nnx.Module):
    """Residual self-attention over the positions, with one head."""

    def __init__(self, rngs: nnx.Rngs, width: int, c: VAEConfig):
        self.group_norm = GroupNorm(width, c.groups, c.norm_eps, c.param_dtype)
        self.to_q = Linear(rngs, width, width, ("embed", "heads"), c.param_dtype, bias=True)
        self.to_k = Linear(rngs, width, width, ("embed", "heads"), c.param_dtype, bias=True)
        self.to_v = Linear(rngs, width, width, ("embed", "heads"), c.param_dtype, bias=True)
        self.to_out = Linear(rngs, width, width, ("heads", "embed"), c.param_dtype, bias=True, gain=1e-2)

    def __call__(self, x: Float[Array, "B h w C"]) -> Float[Array, "B h w C"]:
        y = self.group_norm(x).reshape(x.shape[0], 1, -1, x.shape[-1])  # [B, 1 head, h*w, C]
        mix = fused_attention if y.shape[2] >= LONG_ATTENTION else attention
        y = mix(self.to_q(y), self.to_k(y), self.to_v(y), scale=x.shape[-1] ** -0.5)
        return x + self.to_out(y).reshape(x.shape)


class VAEStage(nnx.Module):
    """One resolution: residual blocks, then downsampling or upsampling if the stage has it."""

    downsamplers: nnx.Dict
    upsamplers: nnx.Dict

    def __init__(self, rngs: nnx.Rngs, inputs: int, outputs: int, layers: int, c: VAEConfig):
        widths = [inputs] + [outputs] * (layers - 1)
        self.resnets = nnx.Dict({str(i): ResnetBlock(rngs, width, outputs, c) for i, width in enumerate(widths)})

    def __call__(self, x: Float[Array, "B h w C"]) -> Float[Array, "B h2 w2 O"]:
        for resnet in self.resnets.values():
            x = resnet(x)
        for name in ("downsamplers", "upsamplers"):
            if hasattr(self, name):
                x = getattr(self, name)["0"](x)
        return x


class VAEMiddle(nnx.Module):
    """resnet, attention, resnet at the lowest resolution."""

    def __init__(self, rngs: nnx.Rngs, width: int, c: VAEConfig):
        self.resnets = nnx.Dict({name: ResnetBlock(rngs, width, width, c) for name in ("0", "1")})
        self.attentions = nnx.Dict({"0": VAEAttention(rngs, width, c)})

    def __call__(self, x: Float[Array, "B h w C"]) -> Float[Array, "B h w C"]:
        return self.resnets["1"](self.attentions["0"](self.resnets["0"](x)))


class VAEEncoder(nnx.Module):
    """Images -> mean and log-variance of the latents, before the 1x1 `quant_conv`."""

    def __init__(self, rngs: nnx.Rngs, c: VAEConfig):
        widths, dtype, last = c.block_channels, c.param_dtype, len(c.block_channels) - 1
        self.conv_in = Conv(rngs, 3, widths[0], dtype)
        stages, width = {}, widths[0]
        for i, outputs in enumerate(widths):
            stage = VAEStage(rngs, width, outputs, c.layers_per_block, c)
            if i < last:  # the published encoder pads only below and to the right
                stage.downsamplers = nnx.Dict({"0": Downsample(rngs, outputs, dtype, padding=(0, 1))})
            stages[str(i)], width = stage, outputs
        self.down_blocks = nnx.Dict(stages)
        self.mid_block = VAEMiddle(rngs, width, c)
        self.conv_norm_out = GroupNorm(width, c.groups, c.norm_eps, dtype)
        self.conv_out = Conv(rngs, width, 2 * c.latent_channels, dtype)

    def __call__(self, x: Float[Array, "B height width 3"]) -> Float[Array, "B h w C2"]:
        x = self.conv_in(x)
        for stage in self.down_blocks.values():
            x = stage(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(self.mid_block(x))))


class VAEDecoder(nnx.Module):
    """Latents, after the 1x1 `post_quant_conv`, -> images."""

    def __init__(self, rngs: nnx.Rngs, c: VAEConfig):
        widths, dtype, last = c.block_channels[::-1], c.param_dtype, len(c.block_channels) - 1
        self.conv_in = Conv(rngs, c.latent_channels, widths[0], dtype)
        self.mid_block = VAEMiddle(rngs, widths[0], c)
        stages, width = {}, widths[0]
        for i, outputs in enumerate(widths):
            stage = VAEStage(rngs, width, outputs, c.layers_per_block + 1, c)
            if i < last:
                stage.upsamplers = nnx.Dict({"0": Upsample(rngs, outputs, dtype)})
            stages[str(i)], width = stage, outputs
        self.up_blocks = nnx.Dict(stages)
        self.conv_norm_out = GroupNorm(width, c.groups, c.norm_eps, dtype)
        self.conv_out = Conv(rngs, width, 3, dtype)

    def __call__(self, x: Float[Array, "B h w C"]) -> Float[Array, "B height width 3"]:
        x = self.mid_block(self.conv_in(x))
        for stage in self.up_blocks.values():
            x = stage(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))


class VAE(nnx.Module):
    """Encoder, decoder and the two 1x1 convolutions at the latents."""

    def __init__(self, rngs: nnx.Rngs, c: VAEConfig):
        self.encoder = VAEEncoder(rngs, c)
        self.quant_conv = Linear(
            rngs, 2 * c.latent_channels, 2 * c.latent_channels, ("embed", "mlp"), c.param_dtype, bias=True
        )
        self.post_quant_conv = Linear(
            rngs, c.latent_channels, c.latent_channels, ("embed", "mlp"), c.param_dtype, bias=True
        )
        self.decoder = VAEDecoder(rngs, c)


def init(config: VAEConfig, key: Array) -> Params:
    """Initial parameters (`parameters.init`)."""
    return parameters.init(VAE, config, key)


def abstract(config: VAEConfig) -> Params:
    """The parameters' shapes and dtypes (`parameters.abstract`)."""
    return parameters.abstract(VAE, config)


def logical_axes(config: VAEConfig) -> dict[str, Any]:
    """The parameters' logical axes (`parameters.logical_axes`)."""
    return parameters.logical_axes(VAE, config)


def normalise(pixels: UInt8[Array, "*batch"]) -> Float[Array, "*batch"]:
    """uint8 -> float32 in [-1, 1]."""
    return pixels.astype(jnp.float32) / 127.5 - 1.0


def encode(
    params: Params, images: Float[Array, "B height width 3"], *, config: VAEConfig
) -> tuple[Float[Array, "B h w C"], Float[Array, "B h w C"]]:
    """Images in [-1, 1] -> mean and log-variance of the unscaled latents, float32."""
    vae = parameters.bind(VAE, config, params)
    moments = vae.quant_conv(vae.encoder(images.astype(config.dtype))).astype(jnp.float32)  # [B, h, w, 2C]
    mean, log_variance = jnp.split(moments, 2, axis=-1)
    return mean, jnp.clip(log_variance, -30.0, 20.0)


def decode(params: Params, latents: Float[Array, "B h w C"], *, config: VAEConfig) -> Float[Array, "B height width 3"]:
    """Scaled latents -> images in about [-1, 1], float32."""
    vae = parameters.bind(VAE, config, params)
    unscaled = (latents / config.scale).astype(config.dtype)
    return vae.decoder(vae.post_quant_conv(unscaled)).astype(jnp.float32)
