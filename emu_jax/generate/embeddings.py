"""Visual embeddings, generated one by one: hidden state -> visual head -> next input, Q times after [IMG].

The prompt is prefilled once, and each further step costs one position (the reference recomputes the whole prefix).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from emu_jax.generate.text import prefill
from emu_jax.models import emu
from emu_jax.models.llama import KVCache


@functools.partial(jax.jit, static_argnames="config")
def generate_embeddings(
    params: emu.Params,
    inputs: Float[Array, "B T D"],
    valid: Bool[Array, "B T"],
    seeds: UInt32[Array, " B"],
    *,
    config: emu.EmuConfig,
) -> Float[Array, "B Q D"]:
    """The next image's embeddings in float32, for prompts that end in [IMG].

    Args:
      inputs: embedded prompts, left-padded. valid: False at padding.
      seeds: seeds of the rows, for a visual head that draws at random. A row depends on its own prompt and seed alone.
    """
    llama, head = emu.bind(config, params).llama, config.visual_head
    count = config.causal.queries
    hidden, cache, position = prefill(llama, inputs, valid, count, config)
    keys = jax.vmap(jax.random.key)(seeds)

    def predict(hidden: Float[Array, "B D"], offset: Int[Array, ""] | int) -> Float[Array, "B D"]:
        own = jax.vmap(lambda key: jax.random.fold_in(key, offset))(keys)
        return head.sample(llama.visual_head, hidden, own)

    def step(carry: tuple[Array, KVCache], offset: Int[Array, ""]) -> tuple[tuple[Array, KVCache], Array]:
        hidden, cache = carry
        embedding = predict(hidden, offset)  # [B, D]
        read = head.next_input(llama.visual_head, embedding, offset)
        hidden, cache = llama.decode(read[:, None], (position + offset)[:, None], cache)
        return (hidden[:, 0], cache), embedding

    (hidden, _), embeddings = jax.lax.scan(step, (hidden, cache), jnp.arange(count - 1))
    embeddings = jnp.concatenate([embeddings, predict(hidden, count - 1)[None]])  # [Q, B, D]
    return embeddings.swapaxes(0, 1).astype(jnp.float32)
