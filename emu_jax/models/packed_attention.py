"""Causal attention within the segments of packed rows.

In: q [B, N, S, H], k and v [B, K, S, H], where K divides N, and segments [B, S]. Out: [B, N, S, H].

There are two kernels; `auto` chooses by the devices that the step is compiled for:

    plain    scores in memory, on any device
    splash   a TPU kernel (`splash.py`): scores never leave the chip, blocks above the diagonal are skipped
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Bool, Int

from emu_jax.errors import UserError
from emu_jax.models.layers import Array, attention
from emu_jax.models.splash import splash_attention, why_unsupported
from emu_jax.sharding import platform

KERNELS = ("auto", "plain", "splash")


def segment_mask(segments: Int[Array, "B S"]) -> Bool[Array, "B 1 S S"]:
    """The attention mask of packed rows: causal within each segment.

    Segments 1 1 2 2 0 (two documents and padding) give

        1 0 0 0 0
        1 1 0 0 0
        0 0 1 0 0
        0 0 1 1 0
        0 0 0 0 1
    """
    length = segments.shape[1]
    causal = jnp.tril(jnp.ones((length, length), bool))
    return (causal & (segments[:, :, None] == segments[:, None, :]))[:, None]


def packed_attention(
    segments: Int[Array, "B S"], head_dim: int, kernel: str = "auto"
) -> Callable[[Array, Array, Array], Array]:
    """The attention of rows with these segments, for every layer: (q, k, v) -> output [B, N, S, H].

    Scores are scaled by H**-0.5. The output is named "attention", so that remat policies can save it.

    Raises:
      UserError: `kernel` is "splash", which does not support these shapes.
    """
    scale, length = head_dim**-0.5, segments.shape[1]
    if kernel == "splash" or (kernel == "auto" and platform() == "tpu"):
        problem = why_unsupported(length, length)
        if problem is None:
            return lambda q, k, v: splash_attention(q, k, v, scale=scale, segments=segments, causal=True)
        if kernel == "splash":
            raise UserError(f"config.model.llama.attention=splash: rows of {problem}; choose plain")
    mask = segment_mask(segments)
    return lambda q, k, v: checkpoint_name(attention(q, k, v, scale=scale, mask=mask), "attention")
