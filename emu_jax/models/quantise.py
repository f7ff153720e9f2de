"""Weight-only int8: kernels of the language model's blocks as 8-bit integers with one float32 scale for each column.

    kernel [in, out] ≈ int8 [in, out] * scale [out],   scale = max |column| / 127

Symmetric, rounded to nearest. `layers.Linear` multiplies by the integers in the compute dtype and scales the products,
so that weights are read from memory as 8 bits. Embeddings, heads and norms, 3% of LLaMA, keep their precision.
Quantised weights serve inference and the training of adapters (`lora.py`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int8

from emu_jax.models.layers import Array
from emu_jax.models.parameters import Params

SCALE = "scale"  # the leaf beside a quantised kernel
LEVELS = 127
KERNEL = re.compile(r"(params/)?llama/blocks/(attn|mlp)/[a-z]+/kernel")


def is_quantised(path: str) -> bool:
    """Whether a leaf, e.g. `params/llama/blocks/attn/q/kernel`, is stored as int8."""
    return KERNEL.fullmatch(path) is not None


def quantise(
    kernel: Float[np.ndarray | Array, "*layers D F"],
) -> tuple[Int8[np.ndarray, "*layers D F"], Float[np.ndarray, "*layers F"]]:
    """Integers and float32 scales; a column of zeros has scale 1."""
    kernel = np.asarray(kernel, np.float32)
    largest = np.abs(kernel).max(axis=-2)  # […, out]
    scale = np.where(largest > 0, largest / LEVELS, 1.0).astype(np.float32)
    return np.rint(kernel / scale[..., None, :]).astype(np.int8), scale


def dequantise_params(params: Mapping[str, Any], dtype: str) -> Params:
    """Parameters without scales, whose quantised kernels are integers * scale, rounded to `dtype` once."""
    found: dict[str, Any] = {}
    for name, value in params.items():
        found[name] = dequantise_params(value, dtype) if isinstance(value, Mapping) else value
    if found.get("kernel") is not None and SCALE in found:
        kernel = jnp.asarray(found["kernel"]).astype(jnp.float32)  # […, in, out]
        found["kernel"] = (kernel * jnp.asarray(found.pop(SCALE))[..., None, :]).astype(dtype)
    return found
