"""Weight-only int8: kernels of the language model's blocks as 8-bit integers, a float32 scale a column.

    kernel [in, out] ≈ int8 [in, out] * scale [out],   scale = max |column| / 127

Symmetric, round to nearest. `layers.Linear` multiplies by the integers in the compute dtype and scales the products,
so that weights are read from memory at 8 bits. Embeddings, heads and norms keep their precision: they are 3% of LLaMA.
Such weights serve inference, and adapters may be trained beside them (`lora.py`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

SCALE = "scale"  # the leaf beside a quantised kernel
LEVELS = 127
KERNEL = re.compile(r"(params/)?llama/blocks/(attn|mlp)/[a-z]+/kernel")


def is_quantised(path: str) -> bool:
    """Whether a leaf, e.g. `params/llama/blocks/attn/q/kernel`, is one of the kernels."""
    return KERNEL.fullmatch(path) is not None


def quantise(kernel: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[…, in, out] -> int8 of the same shape and scales float32 […, out]; a column of zeros has scale 1."""
    kernel = np.asarray(kernel, np.float32)
    largest = np.abs(kernel).max(axis=-2)  # […, out]
    scale = np.where(largest > 0, largest / LEVELS, 1.0).astype(np.float32)
    return np.rint(kernel / scale[..., None, :]).astype(np.int8), scale


def quantise_params(params: Mapping[str, Any]) -> dict[str, Any]:
    """A model's parameters with the kernels of the language model's blocks quantised."""

    def walk(tree: Mapping[str, Any], prefix: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in tree.items():
            path = f"{prefix}{name}"
            if isinstance(value, Mapping):
                found[name] = walk(value, f"{path}/")
            elif is_quantised(path):
                found[name], found[SCALE] = quantise(value)
            else:
                found[name] = value
        return found

    return walk(params, "")


def dequantise_params(params: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Parameters with every quantised kernel as integers * scale, rounded to `dtype` once, and no scales."""
    found: dict[str, Any] = {}
    for name, value in params.items():
        found[name] = dequantise_params(value, dtype) if isinstance(value, Mapping) else value
    if found.get("kernel") is not None and SCALE in found:
        kernel = jnp.asarray(found["kernel"]).astype(jnp.float32)  # […, in, out]
        found["kernel"] = (kernel * jnp.asarray(found.pop(SCALE))[..., None, :]).astype(dtype)
    return found
