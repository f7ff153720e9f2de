"""The visual decoder's VAE: Stable Diffusion's, any width. Images [N, H, W, 3] in [-1, 1] <-> latents [N, h, w, 4].

The encoder gives a Gaussian's mean and log-variance. What diffusion works on is `scale` times a sample (or the mean);
`decode` divides by it. Modules carry the names of the published files' keys (`convert/diffusers.py`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from emu_jax.errors import UserError, check_fields
from emu_jax.models.layers import Array, Linear, attention, named_axes
from emu_jax.models.resnet import Conv, Downsample, GroupNorm, ResnetBlock, Upsample
from emu_jax.models.unet import LONG_ATTENTION, fused_attention

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """The VAE's sizes; hashable, so that jitted functions take it as static.

    Attributes:
      block_channels: width of each resolution; every one but the last halves height and width.
      latent_channels: C of the latents.
      layers_per_block: residual blocks a resolution in the encoder; one more in the decoder.
      scale: what latents are multiplied by, so that their variance is about 1.
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
        for name in ("dtype", "param_dtype"):
            if getattr(self, name) not in ("float32", "bfloat16"):
                raise UserError(f"vae.{name}={getattr(self, name)!r}; expected float32 or bfloat16")

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> VAEConfig:
        """Builds and validates from `config.vae` (a ConfigDict or a plain dict)."""
        check_fields(cls, "vae", fields)
        values = dict(fields)
        if "block_channels" in values:
            values["block_channels"] = tuple(values["block_channels"])
        return cls(**values)

    @property
    def reduction(self) -> int:
        """Pixels a latent, in height and in width."""
        return 2 ** (len(self.block_channels) - 1)


class VAEAttention(nnx.Module):
    """One head of self-attention over the positions: x [N, H, W, C] + its change."""

    def __init__(self, rngs: nnx.Rngs, width: int, c: VAEConfig):
        self.group_norm = GroupNorm(width, c.groups, c.norm_eps, c.param_dtype)
        self.to_q = Linear(rngs, width, width, ("embed", "heads"), c.param_dtype, bias=True)
        self.to_k = Linear(rngs, width, width, ("embed", "heads"), c.param_dtype, bias=True)
        self.to_v = Linear(rngs, width, width, ("embed", "heads"), c.param_dtype, bias=True)
        self.to_out = Linear(rngs, width, width, ("heads", "embed"), c.param_dtype, bias=True, gain=1e-2)

    def __call__(self, x: Array) -> Array:
        y = self.group_norm(x).reshape(x.shape[0], 1, -1, x.shape[-1])  # [N, 1 head, H*W, C]
        mix = fused_attention if y.shape[2] >= LONG_ATTENTION else attention
        y = mix(self.to_q(y), self.to_k(y), self.to_v(y), scale=x.shape[-1] ** -0.5)
        return x + self.to_out(y).reshape(x.shape)


class VAEStage(nnx.Module):
    """One resolution: residual blocks, then a change of resolution where there is one."""

    downsamplers: nnx.Dict
    upsamplers: nnx.Dict

    def __init__(self, rngs: nnx.Rngs, inputs: int, outputs: int, layers: int, c: VAEConfig):
        common: dict[str, Any] = {"groups": c.groups, "eps": c.norm_eps, "dtype": c.param_dtype}
        widths = [inputs] + [outputs] * (layers - 1)
        self.resnets = nnx.Dict({str(i): ResnetBlock(rngs, width, outputs, **common) for i, width in enumerate(widths)})

    def __call__(self, x: Array) -> Array:
        for resnet in self.resnets.values():
            x = resnet(x)
        for name in ("downsamplers", "upsamplers"):
            if hasattr(self, name):
                x = getattr(self, name)["0"](x)
        return x


class VAEMiddle(nnx.Module):
    """resnet, attention, resnet at the lowest resolution."""

    def __init__(self, rngs: nnx.Rngs, width: int, c: VAEConfig):
        common: dict[str, Any] = {"groups": c.groups, "eps": c.norm_eps, "dtype": c.param_dtype}
        self.resnets = nnx.Dict({str(i): ResnetBlock(rngs, width, width, **common) for i in range(2)})
        self.attentions = nnx.Dict({"0": VAEAttention(rngs, width, c)})

    def __call__(self, x: Array) -> Array:
        return self.resnets["1"](self.attentions["0"](self.resnets["0"](x)))


class VAEEncoder(nnx.Module):
    """[N, H, W, 3] -> [N, H/8, W/8, 2C]: mean and log-variance before the 1x1 `quant_conv`."""

    def __init__(self, rngs: nnx.Rngs, c: VAEConfig):
        widths, dtype, last = c.block_channels, c.param_dtype, len(c.block_channels) - 1
        self.conv_in = Conv(rngs, 3, widths[0], dtype)
        stages, width = {}, widths[0]
        for i, outputs in enumerate(widths):
            stage = VAEStage(rngs, width, outputs, c.layers_per_block, c)
            if i < last:  # the published encoder pads below and to the right alone
                stage.downsamplers = nnx.Dict({"0": Downsample(rngs, outputs, dtype, padding=(0, 1))})
            stages[str(i)], width = stage, outputs
        self.down_blocks = nnx.Dict(stages)
        self.mid_block = VAEMiddle(rngs, width, c)
        self.conv_norm_out = GroupNorm(width, c.groups, c.norm_eps, dtype)
        self.conv_out = Conv(rngs, width, 2 * c.latent_channels, dtype)

    def __call__(self, x: Array) -> Array:
        x = self.conv_in(x)
        for stage in self.down_blocks.values():
            x = stage(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(self.mid_block(x))))


class VAEDecoder(nnx.Module):
    """[N, h, w, C] after the 1x1 `post_quant_conv` -> [N, 8h, 8w, 3]."""

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

    def __call__(self, x: Array) -> Array:
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


@functools.lru_cache(maxsize=8)
def _template(config: VAEConfig) -> tuple[nnx.GraphDef, nnx.State]:
    return nnx.split(nnx.eval_shape(lambda: VAE(nnx.Rngs(params=0), config)))


def init(config: VAEConfig, key: Array) -> Params:
    """Fresh parameters, drawn from `key`."""
    return nnx.to_pure_dict(nnx.state(VAE(nnx.Rngs(params=key), config)))


def logical_axes(config: VAEConfig) -> dict[str, Any]:
    """The parameter tree with a tuple of logical axis names at every leaf."""
    return named_axes(_template(config)[1])


def abstract(config: VAEConfig) -> Params:
    """The parameter tree as `ShapeDtypeStruct`s; allocates nothing."""
    return nnx.to_pure_dict(_template(config)[1])


def normalise(pixels: Array) -> Array:
    """uint8 [N, H, W, 3] -> float32 in [-1, 1]."""
    return pixels.astype(jnp.float32) / 127.5 - 1.0


def encode(params: Params, images: Array, *, config: VAEConfig) -> tuple[Array, Array]:
    """images [N, H, W, 3] in [-1, 1] -> mean and log-variance of the unscaled latents, 2 x float32 [N, h, w, C]."""
    vae = nnx.merge(_template(config)[0], params)
    moments = vae.quant_conv(vae.encoder(images.astype(config.dtype))).astype(jnp.float32)  # [N, h, w, 2C]
    mean, log_variance = jnp.split(moments, 2, axis=-1)
    return mean, jnp.clip(log_variance, -30.0, 20.0)


def decode(params: Params, latents: Array, *, config: VAEConfig) -> Array:
    """Scaled latents [N, h, w, C] -> images float32 [N, H, W, 3], about [-1, 1]."""
    vae = nnx.merge(_template(config)[0], params)
    unscaled = (latents / config.scale).astype(config.dtype)
    return vae.decoder(vae.post_quant_conv(unscaled)).astype(jnp.float32)
