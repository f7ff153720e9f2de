"""Convolutional building blocks that the U-Net and the VAE share: channels last, [N, H, W, C] everywhere.

Compute happens in the dtype of the input; group norms are computed in float32 whatever that is.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from emu_jax.models.layers import Array, Linear, constant, parameter, project


def _convolve(x: Array, kernel: Array, stride: int, padding: tuple[tuple[int, int], tuple[int, int]]) -> Array:
    """The compiler's own convolution: x [N, H, W, C], kernel [h, w, C, O] -> [N, H', W', O]."""
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _convolve_by_product(
    x: Array, kernel: Array, stride: int, padding: tuple[tuple[int, int], tuple[int, int]]
) -> Array:
    """The same as one matrix product over shifted copies: on CPUs several times faster, at h * w times the memory."""
    height, width, _, outputs = kernel.shape
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    rows, columns = (x.shape[1] - height) // stride + 1, (x.shape[2] - width) // stride + 1
    shifted = [
        x[:, i : i + (rows - 1) * stride + 1 : stride, j : j + (columns - 1) * stride + 1 : stride]
        for i in range(height)
        for j in range(width)
    ]  # h * w of [N, H', W', C]
    return project(jnp.concatenate(shifted, axis=-1), kernel.reshape(-1, outputs))


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
        y = jax.lax.platform_dependent(
            x,
            kernel,
            cpu=lambda x, kernel: _convolve_by_product(x, kernel, self.stride, self.padding),
            default=lambda x, kernel: _convolve(x, kernel, self.stride, self.padding),
        )
        return y + bias


class GroupNorm(nnx.Module):
    """GroupNorm with scale and bias, in float32; x [N, …, C] -> the same shape, in x's dtype."""

    def __init__(self, channels: int, groups: int, eps: float, dtype: str):
        self.scale = constant(1.0, (channels,), ("norm",), dtype)
        self.bias = constant(0.0, (channels,), ("norm",), dtype)
        self.groups, self.eps = groups, eps

    def __call__(self, x: Array) -> Array:
        y = x.astype(jnp.float32).reshape(x.shape[0], -1, self.groups, x.shape[-1] // self.groups)  # [N, HW, G, C/G]
        mean = y.mean((1, 3), keepdims=True)
        variance = jnp.square(y - mean).mean((1, 3), keepdims=True)
        y = ((y - mean) * jax.lax.rsqrt(variance + self.eps)).reshape(x.shape)
        return (y * self.scale[...] + self.bias[...]).astype(x.dtype)


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
    """Halves height and width by a strided convolution: [N, H, W, C] -> [N, H/2, W/2, C]."""

    def __init__(self, rngs: nnx.Rngs, channels: int, dtype: str, *, padding: tuple[int, int]):
        self.conv = Conv(rngs, channels, channels, dtype, stride=2, padding=padding)

    def __call__(self, x: Array) -> Array:
        return self.conv(x)


class Upsample(nnx.Module):
    """Doubles height and width, nearest neighbour, and convolves: [N, H, W, C] -> [N, 2H, 2W, C]."""

    def __init__(self, rngs: nnx.Rngs, channels: int, dtype: str):
        self.conv = Conv(rngs, channels, channels, dtype)

    def __call__(self, x: Array) -> Array:
        return self.conv(x.repeat(2, axis=1).repeat(2, axis=2))
