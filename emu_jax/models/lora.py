"""Low-rank adapters, LoRA (Hu et al. 2021, arXiv 2106.09685): W + alpha / r * A B for kernels of the language model.

A tree of adapters mirrors the parameters, with `lora_a` [L, in, r] and `lora_b` [L, r, out] in place of a stack's
kernel [L, in, out]. In training they are stored beside the frozen kernels (`LlamaConfig.lora_rank`).

    parameters with adapters ─ separate ─┬─ plain ────┬─ merge ─ W + alpha / r * A B
                                         └─ adapters ─┘
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Float

from emu_jax.models import emu
from emu_jax.models.layers import ADAPTER_LEAVES, Array
from emu_jax.models.parameters import Params
from emu_jax.models.paths import split
from emu_jax.models.quantise import dequantise_params


def is_adapter(path: str) -> bool:
    """Whether a parameter, e.g. `llama/blocks/attn/q/lora_a`, belongs to an adapter."""
    return path.rpartition("/")[2] in ADAPTER_LEAVES


def separate(params: Mapping[str, Any]) -> tuple[Params, Params]:
    """Parameters with adapters -> parameters without them, and the adapters; `paths.join` is the inverse."""
    adapters, plain = split(params, is_adapter)
    return plain, adapters


def merge(params: Mapping[str, Any], adapters: Mapping[str, Any], alpha: float) -> Params:
    """Parameters with the adapters added to their kernels, in float32; all other leaves are shared, not copied."""
    merged = dict(params)
    for name, node in adapters.items():
        if all(leaf in node for leaf in ADAPTER_LEAVES):
            factors = (node[leaf] for leaf in ADAPTER_LEAVES)
            merged[name] = dict(params[name]) | {"kernel": _merged(params[name]["kernel"], *factors, alpha=alpha)}
        else:
            merged[name] = merge(params[name], node, alpha)
    return merged


def merge_model(config: emu.EmuConfig, params: Mapping[str, Any]) -> tuple[emu.EmuConfig, Params]:
    """A model with adapters -> the same model, up to rounding, with the adapters merged; unchanged if it has none.

    Integer kernels are dequantised to `config.param_dtype` first: an adapter's change is smaller than their steps.
    """
    if config.llama.lora_rank == 0:
        return config, dict(params)
    plain, adapters = separate(params)
    if config.llama.quantised:
        plain = dequantise_params(plain, config.param_dtype)
    llama = dataclasses.replace(config.llama, lora_rank=0, lora_dropout=0.0, quantised="")
    return dataclasses.replace(config, llama=llama), merge(plain, adapters, config.llama.lora_alpha)


def drop_adapters(config: emu.EmuConfig, params: Mapping[str, Any]) -> tuple[emu.EmuConfig, Params]:
    """A model with adapters -> its base model; unchanged if it has none."""
    llama = dataclasses.replace(config.llama, lora_rank=0, lora_dropout=0.0)
    return dataclasses.replace(config, llama=llama), separate(params)[0]


def _merged(
    kernel: Float[Array, "L D F"], a: Float[Array, "L D R"], b: Float[Array, "L R F"], *, alpha: float
) -> Float[Array, "L D F"]:
    """kernel + alpha / R * a b, in the kernel's dtype."""
    update = jnp.einsum("lir,lro->lio", a.astype(jnp.float32), b.astype(jnp.float32), precision="highest")
    return (kernel.astype(jnp.float32) + alpha / a.shape[-1] * update).astype(kernel.dtype)
