"""VGG-16 (Simonyan and Zisserman 2015): the convolutions, and a perceptual distance from what they see.

pixels in [-1, 1], [N, H, W, 3] -> the outputs of the five blocks, [N, H / 2^b, W / 2^b, C_b] each
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from einops import reduce
from jaxtyping import Float

from emu_jax.models.layers import Array

# Convolutions in each block, and their channels; each block has half the resolution of the previous one.
BLOCKS = (2, 2, 3, 3, 3)
CHANNELS = (64, 128, 256, 512, 512)
# Normalisation of pixels in [-1, 1] that the weights were trained with.
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)

Params = list[tuple[Array, Array]]  # kernel [3, 3, C, O], bias [O], in order


def activations(params: Params, images: Float[Array, "N H W 3"], blocks: int = len(BLOCKS)) -> list[Array]:
    """Images in [-1, 1] -> the outputs of the first blocks, [N, H / 2^b, W / 2^b, C_b] each."""
    x = (images - jnp.array(SHIFT)) / jnp.array(SCALE)
    layers, found = iter(params), []
    for block, count in enumerate(BLOCKS[:blocks]):
        if block:
            x = reduce(x, "n (h p) (w q) c -> n h w c", "max", p=2, q=2)
        for _ in range(count):
            kernel, bias = next(layers)
            x = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
            x = jax.nn.relu(x + bias)
        found.append(x)
    return found


def normalised(x: Float[Array, "N h w C"]) -> Float[Array, "N h w C"]:
    """Features of unit length at each position, as in LPIPS (Zhang et al. 2018)."""
    return x * jax.lax.rsqrt(jnp.square(x).sum(-1, keepdims=True) + 1e-10)


def distance(
    params: Params, images: Float[Array, "N H W 3"], others: Float[Array, "N H W 3"], blocks: int
) -> Float[Array, " N"]:
    """Squared distances of normalised features: of each block the mean over positions, summed over the first blocks.

    Like LPIPS without its learnt weights of channels.
    """
    pairs = zip(activations(params, images, blocks), activations(params, others, blocks), strict=True)
    return jnp.stack([jnp.square(normalised(a) - normalised(b)).sum(-1).mean((1, 2)) for a, b in pairs]).sum(0)
