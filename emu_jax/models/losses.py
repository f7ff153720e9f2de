"""Cross-entropy of the next token over hidden states, and the means of it and of the visual head's loss (`heads/`).

In: hidden states [B, S, D] at the predicting positions, labels, and a weight for every position. Out: a weighted sum
and its terms [B, S]. `emu.loss` divides the sums by `Mean.total`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from emu_jax.errors import UserError
from emu_jax.models.layers import Array
from emu_jax.sharding import num_shards, with_logical_constraint

MEANS = ("tokens", "sources")


# ---- cross-entropy of the next token -------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def cross_entropy(
    hidden: Float[Array, "B S D"],
    head: Float[Array, "D V"],
    labels: Int[Array, "B S"],
    weights: Float[Array, "B S"],
    chunk: int,
) -> tuple[Float[Array, ""], Float[Array, "B S"]]:
    """Weighted sum of -log p(label), and its terms. The sum is differentiable in `hidden` and `head`.

    The sequence is processed in chunks of `chunk` positions, so that float32 logits [B, chunk, V] exist for one chunk
    at a time. Positions with a label are moved to the front of their row and chunks without any are skipped: images
    and padding cost no logits. The gradients are computed in the forward pass, from the same logits; the backward pass
    neither stores nor recomputes them.
    """
    head = _gather_width(head, hidden)
    order, inverse = _labelled_first(weights)
    pieces = jax.tree.map(lambda x: _to_chunks(x, order, min(chunk, x.shape[1])), (hidden, labels, weights))

    def piece_loss(piece: tuple) -> Array:
        return jax.lax.cond(
            (piece[2] != 0).any(),
            lambda hidden, labels, weights: _chunk_cross_entropy(hidden, head, labels, weights)[0],
            lambda hidden, labels, weights: jnp.zeros_like(weights),
            *piece,
        )

    losses = _from_chunks(jax.lax.map(piece_loss, pieces), inverse)  # [B, S]
    return losses.sum(), losses


def _chunk_cross_entropy(
    hidden: Float[Array, "B C D"], head: Float[Array, "D V"], labels: Int[Array, "B C"], weights: Float[Array, "B C"]
) -> tuple[Float[Array, "B C"], Float[Array, "B C V"], Float[Array, "B C"]]:
    """A chunk's weighted losses, its float32 logits and their log-normalisers."""
    logits = jnp.einsum("bcd,dv->bcv", hidden, head).astype(jnp.float32)
    normaliser = jax.nn.logsumexp(logits, axis=-1)
    picked = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    return (normaliser - picked) * weights, logits, normaliser


def _cross_entropy_forward(hidden: Array, head: Array, labels: Array, weights: Array, chunk: int) -> tuple:
    kernel = _gather_width(head, hidden)
    rows, length, _ = hidden.shape
    groups = num_shards("batch", rows)
    order, inverse = _labelled_first(weights)
    pieces = jax.tree.map(lambda x: _to_chunks(x, order, min(chunk, length)), (hidden, labels, weights))

    def labelled(head_gradient: Array, hidden: Array, labels: Array, weights: Array) -> tuple:
        loss, logits, normaliser = _chunk_cross_entropy(hidden, kernel, labels, weights)
        # d loss / d logits = (softmax - one at the label) * weight
        here = jnp.arange(logits.shape[-1]) == labels[..., None]
        gradient = (jnp.exp(logits - normaliser[..., None]) - here) * weights[..., None]  # [B, C, V]
        gradient = gradient.astype(hidden.dtype)
        hidden_gradient = jnp.einsum("bcv,dv->bcd", gradient, kernel)
        by_group = (x.reshape(groups, -1, *x.shape[1:]) for x in (hidden, gradient))
        head_gradient += jnp.einsum("gbcd,gbcv->gdv", *by_group, preferred_element_type=jnp.float32)
        return head_gradient, (loss, hidden_gradient)

    def skipped(head_gradient: Array, hidden: Array, labels: Array, weights: Array) -> tuple:
        return head_gradient, (jnp.zeros_like(weights), jnp.zeros_like(hidden))

    def step(head_gradient: Array, piece: tuple) -> tuple[Array, tuple[Array, Array]]:
        return jax.lax.cond((piece[2] != 0).any(), labelled, skipped, head_gradient, *piece)

    # One sum for each device's rows [G, D, V], reduced once after the loop. Otherwise the compiler would all-gather the
    # gradients of all rows' logits in every chunk.
    zeros = with_logical_constraint(jnp.zeros((groups, *head.shape), jnp.float32), ("batch", "embed_act", "vocab"))
    head_gradient, (losses, hidden_gradients) = jax.lax.scan(step, zeros, pieces)
    losses, hidden_gradient = _from_chunks(losses, inverse), _from_chunks(hidden_gradients, inverse)
    return (losses.sum(), losses), (hidden_gradient, head_gradient.sum(0).astype(head.dtype))


def _cross_entropy_backward(chunk: int, gradients: tuple[Array, Array], cotangents: tuple[Array, Array]) -> tuple:
    (hidden, head), (cotangent, _) = gradients, cotangents  # the terms only serve metrics
    return (hidden * cotangent).astype(hidden.dtype), (head * cotangent).astype(head.dtype), None, None


cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


def _gather_width(head: Array, hidden: Array) -> Array:
    """The head [D, V] in the compute dtype, with all of D on every device.

    If D stayed sharded, the compiler would all-reduce partial logits of all rows instead of gathering the head: 67 GB a
    step in place of 0.33 GB at the published size.
    """
    return with_logical_constraint(head.astype(hidden.dtype), ("embed_act", "vocab"))


def _labelled_first(weights: Float[Array, "B S"]) -> tuple[Int[Array, "B S"], Int[Array, "B S"]]:
    """The order that puts every row's positions with a weight first, and its inverse."""
    order = jnp.argsort(weights == 0, axis=1, stable=True)
    return order, jnp.argsort(order, axis=1)


def _to_chunks(x: Array, order: Int[Array, "B S"], chunk: int) -> Array:
    """[B, S, …] in `order` -> [S/chunk, B, chunk, …], padded with zeros."""
    x = jnp.take_along_axis(x, order.reshape(*order.shape, *(1,) * (x.ndim - 2)), axis=1)
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % chunk)) + ((0, 0),) * (x.ndim - 2))
    return x.reshape(x.shape[0], -1, chunk, *x.shape[2:]).swapaxes(0, 1)


def _from_chunks(pieces: Array, inverse: Int[Array, "B S"]) -> Array:
    """The inverse of `_to_chunks`: [S/chunk, B, chunk, …] -> [B, S, …] in the rows' own order."""
    x = pieces.swapaxes(0, 1).reshape(inverse.shape[0], -1, *pieces.shape[3:])
    return jnp.take_along_axis(x, inverse.reshape(*inverse.shape, *(1,) * (x.ndim - 2)), axis=1)


# ---- means over tokens and over sources ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class SourceWeights:
    """A source of the batch by name, and the factors of its text and regression loss.

    The batch's position weights already contain the factors; a mean over sources (`over_sources`) weights the sources'
    means by them.
    """

    name: str
    text: float = 1.0
    visual: float = 1.0

    def __post_init__(self):
        if not all(math.isfinite(weight) and weight >= 0 for weight in (self.text, self.visual)):
            found = f"weights {self.text} (text) and {self.visual} (visual)"
            raise UserError(f"source {self.name}: {found}; expected numbers of 0 or more")


class Mean(NamedTuple):
    """How one loss is averaged: the sum of its terms, each times the position's weight, divided by `total`."""

    weights: Float[Array, "B S"]
    total: Float[Array, ""]
    source_totals: Float[Array, " K"]  # the total of each source; empty without sources


def over_sources(mean: Mean, source_ids: Int[Array, "B S"], factors: Sequence[float]) -> Mean:
    """The same mean taken over each source's positions first, then over the sources weighted by K `factors`."""
    scales = source_scales(mean.source_totals, factors)  # [K]
    return Mean(mean.weights * scales[source_ids], jnp.ones(()), mean.source_totals * scales)


def source_scales(totals: Float[Array, " K"], factors: Sequence[float]) -> Float[Array, " K"]:
    """What multiplies the position weights of each source for a mean over sources, from its total and its factor.

    Each source's loss is its own weighted mean. The sources that are in the batch are averaged, weighted by their
    factors. Totals 6, 2, 0 with factors 1, 0.5, 1 give 1/6, 0.5/2 and 0, divided by 1.5, the factors of the first two.
    """
    present = totals > 0
    factors = jnp.where(present, jnp.asarray(factors, jnp.float32), 0.0)
    return factors / jnp.where(present, totals, 1.0) / jnp.maximum(factors.sum(), 1e-6)


def sum_by_source(
    values: Float[Array, "B S"], source_ids: Int[Array, "B S"] | None, num_sources: int
) -> Float[Array, " K"]:
    """Sums over the positions of each of `num_sources` sources."""
    assert source_ids is not None  # batches of several sources have them
    return jnp.einsum("bs,bsk->k", values, jax.nn.one_hot(source_ids, num_sources, dtype=values.dtype))
