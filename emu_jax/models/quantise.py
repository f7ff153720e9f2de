"""Weight-only quantisation: kernels of the language model's blocks as 8-bit or 4-bit integers with float32 scales.

    int8:  kernel [in, out] ≈ int8 [in, out] * scale [out],          scale = max |column| / 127
    int4:  kernel [in, out] ≈ int4 [in, out] * scale [in / G, out],  one scale for G rows of a column

Symmetric, rounded to nearest. `layers.Linear` multiplies by int8 in the compute dtype and scales the products; int4 it
scales first, and the compiler reads 4 bits from memory and does both on the way to the product. An int4 scale is the
one of some candidates that leaves the smallest squared error, because in 15 levels a clipped outlier costs less than
coarse steps. Embeddings, heads and norms, 3% of LLaMA, keep their precision. Quantised weights serve inference; int8
also serves the training of adapters (`lora.py`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Float, Int

from emu_jax.models.parameters import Params

KINDS = {"int8": np.dtype(np.int8), "int4": np.dtype(ml_dtypes.int4)}
SCALE = "scale"  # the leaf beside a quantised kernel
LEVELS = {"int8": 127, "int4": 7}
GROUP = 128  # rows of an int4 kernel that share a scale
SMALLEST_GROUP = 16  # kernels whose width has no group of this size have one scale a column
CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)  # candidates: shares of the largest absolute value
KERNEL = re.compile(r"(params/)?llama/blocks/(attn|mlp)/[a-z]+/kernel")


def element_bytes(dtype: Any) -> float:
    """Bytes of an element on a device: half of one for int4, which NumPy keeps in a whole one.

    >>> element_bytes("bfloat16"), element_bytes("int4")
    (2.0, 0.5)
    """
    return 0.5 if jnp.dtype(dtype) == KINDS["int4"] else float(jnp.dtype(dtype).itemsize)


def is_quantised(path: str) -> bool:
    """Whether a leaf, e.g. `params/llama/blocks/attn/q/kernel`, is stored as integers."""
    return KERNEL.fullmatch(path) is not None


def scale_shape(kind: str, kernel: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a kernel's scales.

    >>> scale_shape("int8", (40, 5120, 13824)), scale_shape("int4", (40, 5120, 13824))
    ((40, 13824), (40, 40, 13824))
    """
    *layers, inputs, outputs = kernel
    return (*layers, outputs) if kind == "int8" else (*layers, inputs // _group(inputs), outputs)


def _group(inputs: int) -> int:
    """The number of rows that share a scale, for a kernel with this many."""
    size = math.gcd(inputs, GROUP)
    return size if size >= SMALLEST_GROUP else inputs


def quantise(
    kernel: Float[np.ndarray | jax.Array, "*layers D F"], kind: str
) -> tuple[Int[np.ndarray, "*layers D F"], Float[np.ndarray, "*scales F"]]:
    """Integers of a kind (`KINDS`) and float32 scales (`scale_shape`); a column or group of zeros has scale 1."""
    kernel = np.asarray(kernel, np.float32)
    inputs, levels = kernel.shape[-2], LEVELS[kind]
    rows = inputs if kind == "int8" else _group(inputs)
    groups = kernel.reshape(*kernel.shape[:-2], -1, rows, kernel.shape[-1])  # […, g, G, F]
    largest = np.abs(groups).max(axis=-2, keepdims=True)  # […, g, 1, F]
    largest = np.where(largest > 0, largest, levels).astype(np.float32)
    step = np.full_like(largest, 1 / levels)  # in units of the largest value
    if kind == "int4":
        units = groups / largest
        errors = [np.square(_round(units, clip / levels, levels) * (clip / levels) - units).sum(-2) for clip in CLIPS]
        best = np.argmin(errors, axis=0)[..., None, :]  # […, g, 1, F]
        step = (np.array(CLIPS, np.float32) / levels)[best]
    scale = largest * step
    integers = _round(groups, scale, levels).reshape(kernel.shape).astype(KINDS[kind])
    return integers, scale.reshape(scale_shape(kind, kernel.shape))


def _round(values: np.ndarray, scale: np.ndarray | float, levels: int) -> np.ndarray:
    return np.clip(np.rint(values / scale), -levels, levels)


def dequantise(
    integers: Int[np.ndarray | jax.Array, "*layers D F"],
    scale: Float[np.ndarray | jax.Array, "*scales F"],
    dtype: Any,
) -> Float[jax.Array, "*layers D F"]:
    """integers * scale, computed and returned in `dtype`, for scales of either kind."""
    integers, scale = jnp.asarray(integers).astype(dtype), jnp.asarray(scale).astype(dtype)
    if scale.ndim < integers.ndim:
        return integers * scale[..., None, :]
    groups = integers.reshape(*scale.shape[:-1], -1, scale.shape[-1])  # […, g, G, F]
    return (groups * scale[..., None, :]).reshape(integers.shape)


def dequantise_params(params: Mapping[str, Any], dtype: str) -> Params:
    """Parameters without scales, whose quantised kernels are integers * scale, rounded to `dtype` once."""
    found: dict[str, Any] = {}
    for name, value in params.items():
        found[name] = dequantise_params(value, dtype) if isinstance(value, Mapping) else value
    if found.get("kernel") is not None and SCALE in found:
        found["kernel"] = dequantise(found["kernel"], found.pop(SCALE), jnp.float32).astype(dtype)
    return found
