"""The two losses over hidden states: cross-entropy of the next token, and regression of the next input embedding.

In: hidden states [B, S, D] at the predicting positions, labels or targets, a weight for every position. Out: weighted
sums and their terms [B, S]; `emu.loss` divides them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from emu_jax.errors import UserError
from emu_jax.models.layers import Array
from emu_jax.sharding import num_shards, with_logical_constraint

MEANS = ("tokens", "sources")


@dataclasses.dataclass(frozen=True)
class SourceWeights:
    """A source of the batch by name, and the factors of its text and regression loss.

    The factors are in the batch's own weights already; a mean over sources (`source_scales`) weighs by them.
    """

    name: str
    text: float = 1.0
    visual: float = 1.0

    def __post_init__(self):
        if not all(math.isfinite(weight) and weight >= 0 for weight in (self.text, self.visual)):
            found = f"weights {self.text} (text) and {self.visual} (visual)"
            raise UserError(f"source {self.name}: {found}; expected numbers of 0 or more")


def _labelled_first(weights: Array) -> tuple[Array, Array]:
    """[B, S] -> the order that puts every row's positions with a weight first, and its inverse, both [B, S]."""
    order = jnp.argsort(weights == 0, axis=1, stable=True)
    return order, jnp.argsort(order, axis=1)


def _cut(x: Array, order: Array, chunk: int) -> Array:
    """[B, S, …] in `order` [B, S] -> [S/chunk, B, chunk, …], padded with zeros."""
    x = jnp.take_along_axis(x, order.reshape(*order.shape, *(1,) * (x.ndim - 2)), axis=1)
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % chunk)) + ((0, 0),) * (x.ndim - 2))
    return x.reshape(x.shape[0], -1, chunk, *x.shape[2:]).swapaxes(0, 1)


def _whole_head(head: Array, hidden: Array) -> Array:
    """The head [D, V] in the compute dtype, whole along D on every device.

    Left split there, the compiler would rather sum partial logits of all rows over the devices: at the published size
    67 GB a step in place of a third of one.
    """
    return with_logical_constraint(head.astype(hidden.dtype), ("embed_act", "vocab"))


def _chunk_loss(hidden: Array, head: Array, labels: Array, weights: Array) -> tuple[Array, Array, Array]:
    """A chunk's weighted losses [B, C], its logits [B, C, V] in float32 and their log-normalisers [B, C]."""
    logits = jnp.einsum("bcd,dv->bcv", hidden, head).astype(jnp.float32)
    normaliser = jax.nn.logsumexp(logits, axis=-1)
    picked = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    return (normaliser - picked) * weights, logits, normaliser


def _uncut(pieces: Array, inverse: Array) -> Array:
    """The inverse of `_cut`: [S/chunk, B, chunk, …] -> [B, S (padded), …], in the row's own order."""
    x = pieces.swapaxes(0, 1).reshape(inverse.shape[0], -1, *pieces.shape[3:])
    return jnp.take_along_axis(x, inverse.reshape(*inverse.shape, *(1,) * (x.ndim - 2)), axis=1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def text_loss(hidden: Array, head: Array, labels: Array, weights: Array, chunk: int) -> tuple[Array, Array]:
    """Weighted sum of next-token negative log-likelihoods, and its terms; the sum is differentiable in hidden and head.

    hidden [B, S, D] at the predicting positions, head [D, V], labels int32 and weights float32 [B, S] -> [] and [B, S].
    The sequence is cut into chunks of `chunk` positions, and float32 logits [B, chunk, V] live for one of them at a
    time. Positions with a label are moved to the front of their row, and chunks without any are skipped: images
    and padding cost no logits. The gradients are taken on the way, from the same logits: nothing is kept for or
    recomputed in a backward pass.
    """
    head = _whole_head(head, hidden)
    order, inverse = _labelled_first(weights)
    pieces = jax.tree.map(lambda x: _cut(x, order, min(chunk, x.shape[1])), (hidden, labels, weights))

    def piece_loss(piece: tuple) -> Array:
        return jax.lax.cond(
            (piece[2] != 0).any(),
            lambda hidden, labels, weights: _chunk_loss(hidden, head, labels, weights)[0],
            lambda hidden, labels, weights: jnp.zeros_like(weights),
            *piece,
        )

    losses = _uncut(jax.lax.map(piece_loss, pieces), inverse)  # [B, S]
    return losses.sum(), losses


def _text_loss_forward(hidden: Array, head: Array, labels: Array, weights: Array, chunk: int) -> tuple:
    kernel = _whole_head(head, hidden)
    rows, length, _ = hidden.shape
    groups = num_shards("batch", rows)
    order, inverse = _labelled_first(weights)
    pieces = jax.tree.map(lambda x: _cut(x, order, min(chunk, length)), (hidden, labels, weights))

    def labelled(head_gradient: Array, hidden: Array, labels: Array, weights: Array) -> tuple:
        loss, logits, normaliser = _chunk_loss(hidden, kernel, labels, weights)
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

    # A sum for each device's rows [G, D, V], added up once behind the loop: the compiler would else bring the
    # gradients of all rows' logits to every device, in every chunk.
    zeros = with_logical_constraint(jnp.zeros((groups, *head.shape), jnp.float32), ("batch", "embed_act", "vocab"))
    head_gradient, (losses, hidden_gradients) = jax.lax.scan(step, zeros, pieces)
    losses, hidden_gradient = _uncut(losses, inverse), _uncut(hidden_gradients, inverse)  # [B, S], [B, S, D]
    return (losses.sum(), losses), (hidden_gradient, head_gradient.sum(0).astype(head.dtype))


def _text_loss_backward(chunk: int, gradients: tuple[Array, Array], cotangents: tuple[Array, Array]) -> tuple:
    (hidden, head), (cotangent, _) = gradients, cotangents  # the terms are for reports
    return (hidden * cotangent).astype(hidden.dtype), (head * cotangent).astype(head.dtype), None, None


text_loss.defvjp(_text_loss_forward, _text_loss_backward)


def regression_losses(predictions: Array, targets: Array, weights: Array) -> Array:
    """Weighted squared distances, meaned over the width: [B, S, D] twice, [B, S] -> [B, S]; float32."""
    difference = predictions.astype(jnp.float32) - jax.lax.stop_gradient(targets).astype(jnp.float32)
    return jnp.square(difference).mean(-1) * weights


def by_source(values: Array, sources: Array | None, count: int) -> Array:
    """[B, S] -> sums over the positions of each source, [count]."""
    assert sources is not None  # a batch of several sources tells them
    return jnp.einsum("bs,bsk->k", values, jax.nn.one_hot(sources, count, dtype=values.dtype))


def source_scales(totals: Array, weights: Sequence[float]) -> Array:
    """What a position's weight is multiplied by for a mean over sources: [K] from sums of weights and K factors.

    Each source's loss is its own weighted mean; those of the sources that the batch has are averaged by their factors.
    Sums 6, 2, 0 with factors 1, 0.5, 1 give 1/6, 0.5/2 and 0, divided by the 1.5 of the two that are present.
    """
    present = totals > 0
    factors = jnp.where(present, jnp.asarray(weights, jnp.float32), 0.0)
    return factors / jnp.where(present, totals, 1.0) / jnp.maximum(factors.sum(), 1e-6)
