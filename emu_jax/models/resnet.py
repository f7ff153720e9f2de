"""Convolutional building blocks that the U-Net and the VAE share: channels last, [N, H, W, C] everywhere.

Compute happens in the dtype of the input; group norms are computed in float32 whatever that is.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from emu_jax.models.layers import Array, Linear, constant, parameter, project


class Conv(nnx.Module):
    """A square convolution with bias, kernel [k, k, C, O]: x [N, H, W, C] -> [N, H', W', O].

    `padding` is what stands (before, after) each axis.
    """

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

    def __call__(self, x: Array) -> Array:
        kernel, bias = self.kernel[...].astype(x.dtype), self.bias[...].astype(x.dtype)
        if kernel.shape[:2] == (1, 1) and self.stride == 1 and self.padding == ((0, 0), (0, 0)):
            return project(x, kernel[0, 0]) + bias
        y = jax.lax.conv_general_dilated(
            x, kernel, (self.stride, self.stride), self.padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return y + bias


class GroupNorm(nnx.Module):
    """GroupNorm with scale and bias, in float32; x [N, …, C] -> the same shape, in x's dtype."""

    def __init__(self, channels: int, groups: int, eps: float, dtype: str):
        self.scale = constant(1.0, (channels,), ("norm",), dtype)
        self.bias = constant(0.0, (channels,), ("norm",), dtype)
        self.groups, self.eps = groups, eps

    def __call__(self, x: Array) -> Array:
        y = x.astype(jnp.float32).reshape(x.shape[0], -1, x.shape[-1])  # [N, HW, C]
        y = y - self._group_means(y)
        scale = jax.lax.rsqrt(self._group_means(jnp.square(y)) + self.eps) * self.scale[...]  # [N, 1, C]
        return (y * scale + self.bias[...]).reshape(x.shape).astype(x.dtype)

    def _group_means(self, y: Array) -> Array:
        """y [N, HW, C] -> [N, 1, C], alike within a group. Positions first: channels are what lies together."""
        means = y.mean(1).reshape(y.shape[0], self.groups, -1).mean(-1, keepdims=True)  # [N, G, 1]
        return means.repeat(y.shape[-1] // self.groups, axis=-1).reshape(y.shape[0], 1, -1)


class ResnetBlock(nnx.Module):
    """shortcut(x) + conv2(silu(norm2(conv1(silu(norm1(x))) + time))); x [N, H, W, C] -> [N, H, W, O].

    `time` is the width of the time embedding, 0 for none.
    """

    def __init__(
        self, rngs: nnx.Rngs, inputs: int, outputs: int, *, groups: int, eps: float, dtype: str, time: int = 0
    ):
        self.norm1 = GroupNorm(inputs, groups, eps, dtype)
        self.conv1 = Conv(rngs, inputs, outputs, dtype)
        if time:
            self.time_emb_proj = Linear(rngs, time, outputs, ("embed", "mlp"), dtype, bias=True)
        self.norm2 = GroupNorm(outputs, groups, eps, dtype)
        self.conv2 = Conv(rngs, outputs, outputs, dtype, gain=1e-2)  # starts close to its shortcut
        if inputs != outputs:
            self.conv_shortcut = Conv(rngs, inputs, outputs, dtype, size=1, padding=(0, 0))

    def __call__(self, x: Array, time: Array | None = None) -> Array:
        """`time` [N, T] is the time embedding, where there is one."""
        y = self.conv1(jax.nn.silu(self.norm1(x)))
        if time is not None:
            y = y + self.time_emb_proj(jax.nn.silu(time))[:, None, None, :]
        y = self.conv2(jax.nn.silu(self.norm2(y)))
        return (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x) + y


class Downsample(nnx.Module):
    """Halves height and width by a strided convolution: [N, H, W, C] -> [N, H/2, W/2, C], odd sizes rounded up."""

    def __init__(self, rngs: nnx.Rngs, channels: int, dtype: str, *, padding: tuple[int, int]):
        self.conv = Conv(rngs, channels, channels, dtype, stride=2, padding=padding)

    def __call__(self, x: Array) -> Array:
        return self.conv(x)


class Upsample(nnx.Module):
    """Doubles height and width, nearest neighbour, and convolves: [N, H, W, C] -> [N, 2H, 2W, C].

    `size`, where an odd one was halved, cuts the last row or column off before the convolution.
    """

    def __init__(self, rngs: nnx.Rngs, channels: int, dtype: str):
        self.conv = Conv(rngs, channels, channels, dtype)

    def __call__(self, x: Array, size: tuple[int, int] | None = None) -> Array:
        x = x.repeat(2, axis=1).repeat(2, axis=2)  # [N, 2H, 2W, C]
        return self.conv(x if size is None else x[:, : size[0], : size[1]])
