"""Convolutional building blocks shared by the U-Net and the VAE: channels last, [B, h, w, C].

Everything is computed in the dtype of the input, except group norms, which are computed in float32.
"""

from __future__ import annotations

from typing import Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float

from emu_jax.models.layers import Array, Linear, constant, parameter, project


class Conv(nnx.Module):
    """A square convolution with bias and kernel [size, size, C, O]; `padding` is (before, after) on both axes."""

    def __init__(
        self,
        rngs: nnx.Rngs,
        inputs: int,
        outputs: int,
        dtype: str,
        *,
        size: int = 3,
        stride: int = 1,
        padding: tuple[int, int] = (1, 1),
        gain: float = 1.0,
    ):
        std = gain * (size * size * inputs) ** -0.5
        self.kernel = parameter(
            rngs, (size, size, inputs, outputs), ("pixels", "pixels", "embed", "mlp"), dtype, std=std
        )
        self.bias = constant(0.0, (outputs,), ("mlp",), dtype)
        self.stride, self.padding = stride, (padding, padding)

    def __call__(self, x: Float[Array, "B h w C"]) -> Float[Array, "B h2 w2 O"]:
        kernel, bias = self.kernel[...].astype(x.dtype), self.bias[...].astype(x.dtype)
        if kernel.shape[:2] == (1, 1) and self.stride == 1 and self.padding == ((0, 0), (0, 0)):
            return project(x, kernel[0, 0]) + bias
        y = jax.lax.conv_general_dilated(
            x, kernel, (self.stride, self.stride), self.padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return y + bias


class GroupNorm(nnx.Module):
    """GroupNorm with scale and bias, computed in float32 and returned in x's dtype."""

    def __init__(self, channels: int, groups: int, eps: float, dtype: str):
        self.scale = constant(1.0, (channels,), ("norm",), dtype)
        self.bias = constant(0.0, (channels,), ("norm",), dtype)
        self.groups, self.eps = groups, eps

    def __call__(self, x: Float[Array, "B *axes C"]) -> Float[Array, "B *axes C"]:
        y = x.astype(jnp.float32).reshape(x.shape[0], -1, x.shape[-1])  # [B, S, C]
        y = y - self._group_means(y)
        scale = jax.lax.rsqrt(self._group_means(jnp.square(y)) + self.eps) * self.scale[...]  # [B, 1, C]
        return (y * scale + self.bias[...]).reshape(x.shape).astype(x.dtype)

    def _group_means(self, y: Float[Array, "B S C"]) -> Float[Array, "B 1 C"]:
        """Each channel's group mean. Positions are reduced first, because channels are contiguous in memory."""
        means = y.mean(1).reshape(y.shape[0], self.groups, -1).mean(-1, keepdims=True)  # [B, G, 1]
        return means.repeat(y.shape[-1] // self.groups, axis=-1).reshape(y.shape[0], 1, -1)


class Sizes(Protocol):
    """What blocks read of a model's config."""

    @property
    def groups(self) -> int: ...
    @property
    def norm_eps(self) -> float: ...
    @property
    def param_dtype(self) -> str: ...


class ResnetBlock(nnx.Module):
    """shortcut(x) + conv2(silu(norm2(conv1(silu(norm1(x))) + time))).

    `time` is the width of the time embedding; 0 means no time embedding.
    """

    def __init__(self, rngs: nnx.Rngs, inputs: int, outputs: int, c: Sizes, *, time: int = 0):
        dtype = c.param_dtype
        self.norm1 = GroupNorm(inputs, c.groups, c.norm_eps, dtype)
        self.conv1 = Conv(rngs, inputs, outputs, dtype)
        if time:
            self.time_emb_proj = Linear(rngs, time, outputs, ("embed", "mlp"), dtype, bias=True)
        self.norm2 = GroupNorm(outputs, c.groups, c.norm_eps, dtype)
        self.conv2 = Conv(rngs, outputs, outputs, dtype, gain=1e-2)  # the block starts close to its shortcut
        if inputs != outputs:
            self.conv_shortcut = Conv(rngs, inputs, outputs, dtype, size=1, padding=(0, 0))

    def __call__(self, x: Float[Array, "B h w C"], time: Float[Array, "B T"] | None = None) -> Float[Array, "B h w O"]:
        y = self.conv1(jax.nn.silu(self.norm1(x)))
        if time is not None:
            y = y + self.time_emb_proj(jax.nn.silu(time))[:, None, None, :]
        y = self.conv2(jax.nn.silu(self.norm2(y)))
        return (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x) + y


class Downsample(nnx.Module):
    """Halves height and width by a strided convolution; odd sizes are rounded up."""

    def __init__(self, rngs: nnx.Rngs, channels: int, dtype: str, *, padding: tuple[int, int]):
        self.conv = Conv(rngs, channels, channels, dtype, stride=2, padding=padding)

    def __call__(self, x: Float[Array, "B h w C"]) -> Float[Array, "B h2 w2 C"]:
        return self.conv(x)


class Upsample(nnx.Module):
    """Doubles height and width by nearest neighbour, then convolves.

    `size`, the target, drops the last row or column before the convolution, where `Downsample` rounded up.
    """

    def __init__(self, rngs: nnx.Rngs, channels: int, dtype: str):
        self.conv = Conv(rngs, channels, channels, dtype)

    def __call__(self, x: Float[Array, "B h w C"], size: tuple[int, int] | None = None) -> Float[Array, "B h2 w2 C"]:
        x = x.repeat(2, axis=1).repeat(2, axis=2)  # [B, 2h, 2w, C]
        return self.conv(x if size is None else x[:, : size[0], : size[1]])
