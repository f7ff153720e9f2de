"""Low-rank adapters (Hu et al. 2021, arXiv 2106.09685): W + alpha / r * A B of kernels of the language model.

A tree of adapters mirrors the parameters, with `a` [L, in, r] and `b` [L, r, out] in place of a stack's kernel
[L, in, out]. While they are trained they stand beside the kernels (`LlamaConfig.lora_rank`), which stay as they are.

    parameters with adapters ─ apart ─┬─ plain ────┬─ merge ─ W + alpha / r * A B ─ unmerge ─ plain
                                      └─ adapters ─┘
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from emu_jax.models import emu
from emu_jax.models.layers import Array
from emu_jax.models.paths import split
from emu_jax.models.quantise import dequantise_params


def is_adapter(path: str) -> bool:
    """Whether a parameter, e.g. `llama/blocks/attn/q/a`, is half of an adapter."""
    return path.rpartition("/")[2] in ("a", "b")


def apart(params: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parameters with adapters beside their kernels -> those without, and the adapters; `paths.join` is the inverse."""
    adapters, plain = split(params, is_adapter)
    return plain, adapters


def merge(params: Mapping[str, Any], adapters: Mapping[str, Any], alpha: float) -> dict[str, Any]:
    """Parameters with adapters added to their kernels, in float32; everything else is shared, not copied."""
    merged = dict(params)
    for name, node in adapters.items():
        if "a" in node and "b" in node:
            merged[name] = dict(params[name]) | {"kernel": _merged(params[name]["kernel"], node["a"], node["b"], alpha)}
        else:
            merged[name] = merge(params[name], node, alpha)
    return merged


def unmerge(params: Mapping[str, Any], adapters: Mapping[str, Any], alpha: float) -> dict[str, Any]:
    """Parameters with adapters taken off their kernels again, in float32: what `merge` had, up to rounding."""
    return merge(params, adapters, -alpha)


def merge_model(config: emu.EmuConfig, params: Mapping[str, Any]) -> tuple[emu.EmuConfig, dict[str, Any]]:
    """A model with adapters beside its kernels -> the same model, up to rounding, with none; others as they are.

    Int8 kernels become `config.param_dtype` first: an adapter does not fit between two of their steps.
    """
    if config.llama.lora_rank == 0:
        return config, dict(params)
    plain, adapters = apart(params)
    if config.llama.int8:
        plain = dequantise_params(plain, config.param_dtype)
    llama = dataclasses.replace(config.llama, lora_rank=0, lora_dropout=0.0, int8=False)
    return dataclasses.replace(config, llama=llama), merge(plain, adapters, config.llama.lora_alpha)


def drop_adapters(config: emu.EmuConfig, params: Mapping[str, Any]) -> tuple[emu.EmuConfig, dict[str, Any]]:
    """A model with adapters beside its kernels -> the one that was tuned; others as they are."""
    llama = dataclasses.replace(config.llama, lora_rank=0, lora_dropout=0.0)
    return dataclasses.replace(config, llama=llama), apart(params)[0]


def _merged(kernel: Array, a: Array, b: Array, alpha: float) -> Array:
    """kernel [L, in, out] + alpha / r * a [L, in, r] b [L, r, out], in the kernel's dtype."""
    update = jnp.einsum("lir,lro->lio", a.astype(jnp.float32), b.astype(jnp.float32), precision="highest")
    return (kernel.astype(jnp.float32) + alpha / a.shape[-1] * update).astype(kernel.dtype)
