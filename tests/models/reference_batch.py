"""Batches as the reference implementation makes them: weights and slots follow from the tokens."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from emu_jax.models.emu import Batch, SpecialIds


def reference_batch(
    images: UInt8[Array, "B I height width 3"] | Float[Array, "B I height width 3"],
    tokens: Int[Array, "B S"],
    segments: Int[Array, "B S"],
    ids: SpecialIds,
) -> Batch:
    """Derives the other fields from images, tokens and segments.

    The n-th [IMG] of a row reads slot n. Text labels are all tokens but [PAD], <image>, [IMG], [/IMG] and a document's
    first; visual targets are every <image> and [/IMG].
    """
    visual = tokens == ids.image
    number = jnp.cumsum(tokens == ids.img, axis=1) - 1  # [B, S]
    inside = jnp.concatenate([jnp.zeros_like(segments[:, :1], bool), segments[:, 1:] == segments[:, :-1]], 1)
    target = visual | (tokens == ids.img_end)
    special = target | (tokens == ids.img) | (tokens == ids.pad)
    live = inside & (segments > 0)
    return Batch(
        images=images,
        tokens=tokens,
        segments=segments,
        slots=jnp.where(visual, number, -1),
        text_weights=(live & ~special).astype(jnp.float32),
        visual_weights=(live & target).astype(jnp.float32),
    )
