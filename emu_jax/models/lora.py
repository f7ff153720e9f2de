"""Low-rank adapters (Hu et al. 2021, arXiv 2106.09685): W + alpha / r * A B of kernels of the language model.

A tree of adapters mirrors the parameters, with `a` [L, in, r] and `b` [L, r, out] in place of a stack's kernel
[L, in, out]. While they are trained they stand beside the kernels (`LlamaConfig.lora_rank`), which stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from emu_jax.models.layers import Array


def is_adapter(path: str) -> bool:
    """Whether a parameter, e.g. `llama/blocks/attn/q/a`, is half of an adapter."""
    return path.rpartition("/")[2] in ("a", "b")


def merge(params: Mapping[str, Any], adapters: Mapping[str, Any], alpha: float) -> dict[str, Any]:
    """Parameters with adapters added to their kernels, in float32; everything else is shared, not copied."""
    merged = dict(params)
    for name, node in adapters.items():
        if "a" in node and "b" in node:
            merged[name] = dict(params[name]) | {"kernel": _merged(params[name]["kernel"], node["a"], node["b"], alpha)}
        else:
            merged[name] = merge(params[name], node, alpha)
    return merged


def _merged(kernel: Array, a: Array, b: Array, alpha: float) -> Array:
    """kernel [L, in, out] + alpha / r * a [L, in, r] b [L, r, out], in the kernel's dtype."""
    update = jnp.einsum("lir,lro->lio", a.astype(jnp.float32), b.astype(jnp.float32), precision="highest")
    return (kernel.astype(jnp.float32) + alpha / a.shape[-1] * update).astype(kernel.dtype)
