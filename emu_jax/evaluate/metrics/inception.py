"""Inception-v3 as FID uses it: images uint8 [H, W, 3] -> float32 [N, 2048].

The weights are the user's own: pytorch-fid's `pt_inception-2015-12-05-6726825d.pth`, which is TensorFlow's network of
December 2015 under the names of torchvision's. It differs from torchvision's network: averages over 3 x 3 windows
exclude padding, and the last block uses max pooling where the others use average pooling.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from emu_jax.checkpoints.convert.tensor_files import TensorFile
from emu_jax.data.padding import pad_to
from emu_jax.errors import UserError
from emu_jax.models.layers import Array

SIZE, FEATURES, CLASSES = 299, 2048, 1008
EPSILON = 1e-3  # of the batch norms
STATISTICS = ("weight", "bias", "running_mean", "running_var")  # of a batch norm
COUNTER = "num_batches_tracked"  # of PyTorch's batch norms since 0.4; nothing needs it

Params = dict[str, tuple[Array, Array]]  # layer -> kernel [h, w, I, O] and bias [O], the batch norm folded in


def _layers() -> dict[str, tuple[int, int, int, int]]:
    """Every convolution: name -> O, I, h, w."""
    found = {
        "Conv2d_1a_3x3": (32, 3, 3, 3),
        "Conv2d_2a_3x3": (32, 32, 3, 3),
        "Conv2d_2b_3x3": (64, 32, 3, 3),
        "Conv2d_3b_1x1": (80, 64, 1, 1),
        "Conv2d_4a_3x3": (192, 80, 3, 3),
    }

    def block(name: str, **branches: tuple[int, int, int, int]) -> None:
        found.update({f"{name}.{branch}": shape for branch, shape in branches.items()})

    for name, wide, pool in (("Mixed_5b", 192, 32), ("Mixed_5c", 256, 64), ("Mixed_5d", 288, 64)):
        block(
            name,
            branch1x1=(64, wide, 1, 1),
            branch5x5_1=(48, wide, 1, 1),
            branch5x5_2=(64, 48, 5, 5),
            branch3x3dbl_1=(64, wide, 1, 1),
            branch3x3dbl_2=(96, 64, 3, 3),
            branch3x3dbl_3=(96, 96, 3, 3),
            branch_pool=(pool, wide, 1, 1),
        )
    block(
        "Mixed_6a",
        branch3x3=(384, 288, 3, 3),
        branch3x3dbl_1=(64, 288, 1, 1),
        branch3x3dbl_2=(96, 64, 3, 3),
        branch3x3dbl_3=(96, 96, 3, 3),
    )
    for name, mid in (("Mixed_6b", 128), ("Mixed_6c", 160), ("Mixed_6d", 160), ("Mixed_6e", 192)):
        block(
            name,
            branch1x1=(192, 768, 1, 1),
            branch7x7_1=(mid, 768, 1, 1),
            branch7x7_2=(mid, mid, 1, 7),
            branch7x7_3=(192, mid, 7, 1),
            branch7x7dbl_1=(mid, 768, 1, 1),
            branch7x7dbl_2=(mid, mid, 7, 1),
            branch7x7dbl_3=(mid, mid, 1, 7),
            branch7x7dbl_4=(mid, mid, 7, 1),
            branch7x7dbl_5=(192, mid, 1, 7),
            branch_pool=(192, 768, 1, 1),
        )
    block(
        "Mixed_7a",
        branch3x3_1=(192, 768, 1, 1),
        branch3x3_2=(320, 192, 3, 3),
        branch7x7x3_1=(192, 768, 1, 1),
        branch7x7x3_2=(192, 192, 1, 7),
        branch7x7x3_3=(192, 192, 7, 1),
        branch7x7x3_4=(192, 192, 3, 3),
    )
    for name, wide in (("Mixed_7b", 1280), ("Mixed_7c", 2048)):
        block(
            name,
            branch1x1=(320, wide, 1, 1),
            branch3x3_1=(384, wide, 1, 1),
            branch3x3_2a=(384, 384, 1, 3),
            branch3x3_2b=(384, 384, 3, 1),
            branch3x3dbl_1=(448, wide, 1, 1),
            branch3x3dbl_2=(384, 448, 3, 3),
            branch3x3dbl_3a=(384, 384, 1, 3),
            branch3x3dbl_3b=(384, 384, 3, 1),
            branch_pool=(192, wide, 1, 1),
        )
    return found


LAYERS = _layers()


def load(file: Path | str) -> Params:
    """Reads the weights; the classifier must be present, but is not kept.

    Raises:
      UserError: a name is missing, unknown or of another shape, as in torchvision's Inception.
    """
    tensors = TensorFile(file)
    expected = {"fc.weight": (CLASSES, FEATURES), "fc.bias": (CLASSES,)}
    for name, shape in LAYERS.items():
        expected[f"{name}.conv.weight"] = shape
        expected |= {f"{name}.bn.{part}": shape[:1] for part in STATISTICS}
    wrong = [f"{name} is missing" for name in expected if name not in tensors]
    for name, shape in tensors.shapes.items():
        if name in expected and shape != expected[name]:
            wrong.append(f"{name} is {list(shape)}, not {list(expected[name])}")
        elif name not in expected and name.removesuffix(f".bn.{COUNTER}") not in LAYERS:
            wrong.append(f"{name} is unknown")
    wrong += [f"{name} is {what}" for name, what in tensors.others.items()]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(
            f"{file}: {'; '.join(wrong[:3])}{more}; expected pytorch-fid's pt_inception-2015-12-05-6726825d.pth"
        )
    params = {}
    for name in LAYERS:
        scale, shift, mean, variance = (np.asarray(tensors[f"{name}.bn.{part}"], np.float64) for part in STATISTICS)
        scale = scale / np.sqrt(variance + EPSILON)
        kernel = np.asarray(tensors[f"{name}.conv.weight"], np.float64).transpose(2, 3, 1, 0) * scale  # [h, w, I, O]
        params[name] = jnp.asarray(kernel, jnp.float32), jnp.asarray(shift - mean * scale, jnp.float32)
    return params


def features(params: Params, images: Iterable[np.ndarray], *, batch: int = 16) -> np.ndarray:
    """Images uint8 [H, W, 3] of any sizes -> float32 [N, 2048], `batch` at a time."""
    images, rows = iter(images), []
    while some := list(itertools.islice(images, batch)):
        pixels = pad_to([_resize(image) for image in some], batch)
        rows.append(np.asarray(activations(params, jnp.stack(pixels)))[: len(some)])
    if not rows:
        raise UserError("no images to take features of; expected two or more")
    return np.concatenate(rows)


@jax.jit
def _resize(pixels: Array) -> Array:
    """uint8 [H, W, 3] -> float32 [299, 299, 3] in [-1, 1]: bilinear, without antialiasing."""
    x = pixels.astype(jnp.float32) / 255
    return 2 * jax.image.resize(x, (SIZE, SIZE, 3), "linear", antialias=False) - 1


@jax.jit
def activations(params: Params, x: Array) -> Array:
    """Pixels in [-1, 1], float32 [N, 299, 299, 3] -> the last block's mean over positions, [N, 2048]."""

    def conv(name: str, x: Array, stride: int = 1, padding: str = "SAME") -> Array:
        kernel, bias = params[name]
        x = lax.conv_general_dilated(
            x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"), precision="highest"
        )
        return jax.nn.relu(x + bias)

    def chain(x: Array, *names: str) -> Array:
        for name in names:
            x = conv(name, x)
        return x

    def concatenate(*branches: Array) -> Array:
        return jnp.concatenate(branches, axis=-1)

    x = conv("Conv2d_1a_3x3", x, 2, "VALID")  # [N, 149, 149, 32]
    x = conv("Conv2d_2b_3x3", conv("Conv2d_2a_3x3", x, 1, "VALID"))  # [N, 147, 147, 64]
    x = _max_pool(x, 2, "VALID")  # [N, 73, 73, 64]
    x = conv("Conv2d_4a_3x3", conv("Conv2d_3b_1x1", x), 1, "VALID")  # [N, 71, 71, 192]
    x = _max_pool(x, 2, "VALID")  # [N, 35, 35, 192]
    for b in ("Mixed_5b.", "Mixed_5c.", "Mixed_5d."):  # [N, 35, 35, 256], then 288
        x = concatenate(
            chain(x, b + "branch1x1"),
            chain(x, b + "branch5x5_1", b + "branch5x5_2"),
            chain(x, b + "branch3x3dbl_1", b + "branch3x3dbl_2", b + "branch3x3dbl_3"),
            chain(_average_pool(x), b + "branch_pool"),
        )
    b = "Mixed_6a."
    x = concatenate(  # [N, 17, 17, 768]
        conv(b + "branch3x3", x, 2, "VALID"),
        conv(b + "branch3x3dbl_3", chain(x, b + "branch3x3dbl_1", b + "branch3x3dbl_2"), 2, "VALID"),
        _max_pool(x, 2, "VALID"),
    )
    for b in ("Mixed_6b.", "Mixed_6c.", "Mixed_6d.", "Mixed_6e."):
        x = concatenate(
            chain(x, b + "branch1x1"),
            chain(x, *(f"{b}branch7x7_{n}" for n in range(1, 4))),
            chain(x, *(f"{b}branch7x7dbl_{n}" for n in range(1, 6))),
            chain(_average_pool(x), b + "branch_pool"),
        )
    b = "Mixed_7a."
    x = concatenate(  # [N, 8, 8, 1280]
        conv(b + "branch3x3_2", conv(b + "branch3x3_1", x), 2, "VALID"),
        conv(b + "branch7x7x3_4", chain(x, *(f"{b}branch7x7x3_{n}" for n in range(1, 4))), 2, "VALID"),
        _max_pool(x, 2, "VALID"),
    )
    for b, pool in (("Mixed_7b.", _average_pool), ("Mixed_7c.", _max_pool)):  # [N, 8, 8, 2048]
        once = conv(b + "branch3x3_1", x)
        twice = chain(x, b + "branch3x3dbl_1", b + "branch3x3dbl_2")
        x = concatenate(
            conv(b + "branch1x1", x),
            conv(b + "branch3x3_2a", once),
            conv(b + "branch3x3_2b", once),
            conv(b + "branch3x3dbl_3a", twice),
            conv(b + "branch3x3dbl_3b", twice),
            conv(b + "branch_pool", pool(x)),
        )
    return x.mean((1, 2))


def _max_pool(x: Array, stride: int = 1, padding: str = "SAME") -> Array:
    """Max pooling over 3 x 3 windows."""
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, stride, stride, 1), padding)


def _average_pool(x: Array) -> Array:
    """Average pooling over 3 x 3 windows around every position, without padding."""
    sums = lax.reduce_window(x, 0.0, lax.add, (1, 3, 3, 1), (1, 1, 1, 1), "SAME")
    rows, columns = (np.convolve(np.ones(size), np.ones(3), "same") for size in x.shape[1:3])  # 2 at the edges
    return sums / np.outer(rows, columns).astype(np.float32)[:, :, None]
