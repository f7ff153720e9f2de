"""Inception-v3 as FID uses it: images uint8 [H, W, 3] -> float32 [N, 2048].

The weights are the user's own: pytorch-fid's `pt_inception-2015-12-05-6726825d.pth`, which is TensorFlow's network of
December 2015 under the names of torchvision's. It differs from torchvision's network: averages over 3 x 3 windows
exclude padding, and the last block uses max pooling where the others use average pooling.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from emu_jax.checkpoints.convert.tensor_files import TensorFile
from emu_jax.errors import UserError
from emu_jax.evaluate.metrics.features import in_batches
from emu_jax.models.layers import Array

SIZE, FEATURES, CLASSES = 299, 2048, 1008
EPSILON = 1e-3  # of the batch norms
STATISTICS = ("weight", "bias", "running_mean", "running_var")  # of a batch norm
COUNTER = "num_batches_tracked"  # of PyTorch's batch norms since 0.4; nothing needs it

Params = dict[str, tuple[Array, Array]]  # layer -> kernel [h, w, I, O] and bias [O], the batch norm folded in


Shape = tuple[int, int, int, int]  # of a kernel in the file: O, I, h, w
HALVED = (2, "VALID")  # stride and padding


def _network(weights: Callable[[str, Shape], tuple[Array, Array]], x: Array) -> Array:
    """Pixels in [-1, 1], [N, 299, 299, 3] -> the last block's mean over positions, [N, 2048].

    Args:
      weights: a layer's name and shape -> its kernel and bias, as in `Params`.
    """

    def conv(
        x: Array, name: str, outputs: int, height: int, width: int, stride: int = 1, padding: str = "SAME"
    ) -> Array:
        kernel, bias = weights(name, (outputs, x.shape[-1], height, width))
        x = lax.conv_general_dilated(
            x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"), precision="highest"
        )
        return jax.nn.relu(x + bias)

    def chain(x: Array, block: str, **layers: tuple) -> Array:
        """A block's layers one after the other: name=(outputs, height, width, ...)."""
        for name, layer in layers.items():
            x = conv(x, f"{block}.{name}", *layer)
        return x

    def concatenate(*branches: Array) -> Array:
        return jnp.concatenate(branches, axis=-1)

    x = conv(x, "Conv2d_1a_3x3", 32, 3, 3, *HALVED)  # [N, 149, 149, 32]
    x = conv(x, "Conv2d_2a_3x3", 32, 3, 3, 1, "VALID")
    x = conv(x, "Conv2d_2b_3x3", 64, 3, 3)  # [N, 147, 147, 64]
    x = _max_pool(x, *HALVED)  # [N, 73, 73, 64]
    x = conv(x, "Conv2d_3b_1x1", 80, 1, 1)
    x = conv(x, "Conv2d_4a_3x3", 192, 3, 3, 1, "VALID")  # [N, 71, 71, 192]
    x = _max_pool(x, *HALVED)  # [N, 35, 35, 192]
    for block, pooled in (("Mixed_5b", 32), ("Mixed_5c", 64), ("Mixed_5d", 64)):  # [N, 35, 35, 256], then 288
        x = concatenate(
            chain(x, block, branch1x1=(64, 1, 1)),
            chain(x, block, branch5x5_1=(48, 1, 1), branch5x5_2=(64, 5, 5)),
            chain(x, block, branch3x3dbl_1=(64, 1, 1), branch3x3dbl_2=(96, 3, 3), branch3x3dbl_3=(96, 3, 3)),
            chain(_average_pool(x), block, branch_pool=(pooled, 1, 1)),
        )
    block = "Mixed_6a"
    x = concatenate(  # [N, 17, 17, 768]
        chain(x, block, branch3x3=(384, 3, 3, *HALVED)),
        chain(x, block, branch3x3dbl_1=(64, 1, 1), branch3x3dbl_2=(96, 3, 3), branch3x3dbl_3=(96, 3, 3, *HALVED)),
        _max_pool(x, *HALVED),
    )
    for block, mid in (("Mixed_6b", 128), ("Mixed_6c", 160), ("Mixed_6d", 160), ("Mixed_6e", 192)):
        x = concatenate(
            chain(x, block, branch1x1=(192, 1, 1)),
            chain(x, block, branch7x7_1=(mid, 1, 1), branch7x7_2=(mid, 1, 7), branch7x7_3=(192, 7, 1)),
            chain(
                x,
                block,
                branch7x7dbl_1=(mid, 1, 1),
                branch7x7dbl_2=(mid, 7, 1),
                branch7x7dbl_3=(mid, 1, 7),
                branch7x7dbl_4=(mid, 7, 1),
                branch7x7dbl_5=(192, 1, 7),
            ),
            chain(_average_pool(x), block, branch_pool=(192, 1, 1)),
        )
    block = "Mixed_7a"
    x = concatenate(  # [N, 8, 8, 1280]
        chain(x, block, branch3x3_1=(192, 1, 1), branch3x3_2=(320, 3, 3, *HALVED)),
        chain(
            x,
            block,
            branch7x7x3_1=(192, 1, 1),
            branch7x7x3_2=(192, 1, 7),
            branch7x7x3_3=(192, 7, 1),
            branch7x7x3_4=(192, 3, 3, *HALVED),
        ),
        _max_pool(x, *HALVED),
    )
    for block, pool in (("Mixed_7b", _average_pool), ("Mixed_7c", _max_pool)):  # [N, 8, 8, 2048]
        once = chain(x, block, branch3x3_1=(384, 1, 1))
        twice = chain(x, block, branch3x3dbl_1=(448, 1, 1), branch3x3dbl_2=(384, 3, 3))
        x = concatenate(
            chain(x, block, branch1x1=(320, 1, 1)),
            chain(once, block, branch3x3_2a=(384, 1, 3)),
            chain(once, block, branch3x3_2b=(384, 3, 1)),
            chain(twice, block, branch3x3dbl_3a=(384, 1, 3)),
            chain(twice, block, branch3x3dbl_3b=(384, 3, 1)),
            chain(pool(x), block, branch_pool=(192, 1, 1)),
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


@functools.cache
def layers() -> dict[str, Shape]:
    """Every convolution and the shape of its kernel in the file."""
    found = {}

    def weights(name: str, shape: Shape) -> tuple[Array, Array]:
        found[name] = shape
        outputs, inputs, height, width = shape
        return jnp.zeros((height, width, inputs, outputs)), jnp.zeros(outputs)

    jax.eval_shape(functools.partial(_network, weights), jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), jnp.float32))
    return found


@jax.jit
def activations(params: Params, x: Array) -> Array:
    """Pixels in [-1, 1], float32 [N, 299, 299, 3] -> [N, 2048]."""
    return _network(lambda name, shape: params[name], x)


def load(file: Path | str) -> Params:
    """Reads the weights; the classifier must be present, but is not kept.

    Raises:
      UserError: a name is missing, unknown or of another shape, as in torchvision's Inception.
    """
    tensors = TensorFile(file)
    expected = {"fc.weight": (CLASSES, FEATURES), "fc.bias": (CLASSES,)}
    for name, shape in layers().items():
        expected[f"{name}.conv.weight"] = shape
        expected |= {f"{name}.bn.{part}": shape[:1] for part in STATISTICS}
    wrong = [f"{name} is missing" for name in expected if name not in tensors]
    for name, shape in tensors.shapes.items():
        if name in expected and shape != expected[name]:
            wrong.append(f"{name} is {list(shape)}, not {list(expected[name])}")
        elif name not in expected and name.removesuffix(f".bn.{COUNTER}") not in layers():
            wrong.append(f"{name} is unknown")
    wrong += [f"{name} is {what}" for name, what in tensors.others.items()]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(
            f"{file}: {'; '.join(wrong[:3])}{more}; expected pytorch-fid's pt_inception-2015-12-05-6726825d.pth"
        )
    params = {}
    for name in layers():
        scale, shift, mean, variance = (np.asarray(tensors[f"{name}.bn.{part}"], np.float64) for part in STATISTICS)
        scale = scale / np.sqrt(variance + EPSILON)
        kernel = np.asarray(tensors[f"{name}.conv.weight"], np.float64).transpose(2, 3, 1, 0) * scale  # [h, w, I, O]
        params[name] = jnp.asarray(kernel, jnp.float32), jnp.asarray(shift - mean * scale, jnp.float32)
    return params


@jax.jit
def resize(pixels: Array) -> Array:
    """uint8 [H, W, 3] -> float32 [299, 299, 3] in [-1, 1]: bilinear, without antialiasing, as pytorch-fid does."""
    x = pixels.astype(jnp.float32) / 255
    return 2 * jax.image.resize(x, (SIZE, SIZE, 3), "linear", antialias=False) - 1


def features(
    params: Params,
    images: Iterable[np.ndarray],
    *,
    prepare: Callable[[np.ndarray], np.ndarray | Array] = resize,
    batch: int = 16,
) -> np.ndarray:
    """Images uint8 [H, W, 3] of any sizes -> float32 [N, 2048], `batch` at a time.

    Args:
      prepare: an image -> what the network sees, float32 [299, 299, 3].

    Raises:
      UserError: there are no images.
    """
    return in_batches(lambda some: activations(params, jnp.stack([prepare(x) for x in some])), images, batch)
