"""Visual embeddings, one after the other: hidden state -> regression head -> next input, Q times after [IMG].

The prefix is read once; every further step costs one position (the reference recomputes the whole prefix).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from emu_jax.models import emu
from emu_jax.models.layers import Array
from emu_jax.models.llama import KVCache


@functools.partial(jax.jit, static_argnames="config")
def generate_embeddings(params: emu.Params, inputs: Array, valid: Array, *, config: emu.EmuConfig) -> Array:
    """Continues prefixes that end in [IMG].

    inputs [B, T, D] (embedded prompts, left-padded), valid bool [B, T] -> float32 [B, Q, D].
    """
    llama = emu.bind(config, params).llama
    rows, length = inputs.shape[:2]
    count = config.causal.queries
    positions = jnp.maximum(jnp.cumsum(valid, axis=1) - 1, 0)  # [B, T]
    cache = llama.init_cache(rows, length + count, config.dtype)
    hidden, cache = llama.decode(inputs.astype(config.dtype), positions, cache, valid)

    def step(carry: tuple[Array, KVCache], offset: Array) -> tuple[tuple[Array, KVCache], Array]:
        hidden, cache = carry
        embedding = llama.regress_head(hidden)  # [B, D]
        position = positions[:, -1:] + 1 + offset  # [B, 1]
        hidden, cache = llama.decode(embedding[:, None], position, cache)
        return (hidden[:, 0], cache), embedding

    (hidden, _), embeddings = jax.lax.scan(step, (hidden[:, -1], cache), jnp.arange(count - 1))
    embeddings = jnp.concatenate([embeddings, llama.regress_head(hidden)[None]])  # [Q, B, D]
    return embeddings.swapaxes(0, 1).astype(jnp.float32)
