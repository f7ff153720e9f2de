"""VGG-16 features: a measure of how similar images look, beyond their pixels.

images uint8 [H, W, 3] -> float32 [N, F]
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from einops import reduce

from emu_jax.data.images import resize
from emu_jax.models.layers import Array
from emu_jax.models.vgg import CHANNELS, Params, activations, normalised

SIZE = 64  # images are scaled to SIZE x SIZE pixels
GRID = 4  # features are averaged over GRID x GRID cells: positions count, but not to the pixel


@jax.jit
def _features(params: Params, pixels: Array) -> Array:
    """uint8 [N, S, S, 3] -> [N, F]: normalised at each position (as in LPIPS), averaged over each cell of a grid."""
    parts = []
    for x in map(normalised, activations(params, pixels.astype(jnp.float32) / 127.5 - 1.0)):  # [N, h, w, C]
        cells = x.shape[1] // GRID
        parts.append(reduce(x, "n (h p) (w q) c -> n (h w c)", "mean", p=cells, q=cells))
    return jnp.concatenate(parts, axis=-1)


def features(params: Params, images: Sequence[np.ndarray]) -> np.ndarray:
    """Images uint8 [H, W, 3] -> float32 [N, F]; compiles once for each batch size."""
    return np.asarray(_features(params, np.stack([resize(image, SIZE) for image in images])))


def equalised(features: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Features [N, F] with each block divided by its spread over `known` [G, F], so that blocks have equal weight.

    Without this the deep blocks, whose features vary most between images, dominate and colours hardly count.
    """
    sizes = [GRID * GRID * channels for channels in CHANNELS]
    ends = np.cumsum(sizes)
    spreads = [known[:, end - size : end].var(0).sum() ** 0.5 for size, end in zip(sizes, ends, strict=True)]
    return features / np.repeat(np.array(spreads, np.float32), sizes)
