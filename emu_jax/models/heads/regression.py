"""Regression of the next embedding by a linear map, with a choice of distances.

    l2         |p - t|^2 / D                                     the published objective
    l1         |p - t|_1 / D
    smooth_l1  Huber's loss / D: quadratic up to a difference of 1, linear beyond
    cosine     1 - cos(p, t)
    infonce    -log of the softmax of cos(p, t) / temperature over all targets of the step (van den Oord et al. 2018,
               arXiv 1807.03748)

The last two judge directions alone. Their head learns one length for all samples beside them: the mean log |t|.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float, Key

from emu_jax.errors import UserError
from emu_jax.models.heads.head import HeadLoss, VisualHead
from emu_jax.models.layers import Array, Linear, constant

EPSILON = 1e-6  # added to norms
LARGEST_SCALE = 100.0  # of cosines, 1 / temperature, as in CLIP


@dataclasses.dataclass(frozen=True)
class Regression(VisualHead):
    """A linear map D -> D and an elementwise distance: l2, l1 or smooth_l1."""

    def make(self, rngs: nnx.Rngs, width: int, dtype: str, init: str) -> nnx.Module:
        """With `init` "reference" as torch's nn.Linear: the reference adds the head to a trained LLaMA."""
        return Linear(rngs, width, width, ("embed", "mlp"), dtype, as_torch=init == "reference")

    def loss(
        self,
        module: Any,
        hidden: Float[Array, "B S D"],
        targets: Float[Array, "B S D"],
        weights: Float[Array, "B S"],
        key: Key[Array, ""],
    ) -> HeadLoss:
        return distance_loss(DISTANCES[self.name], module(hidden), targets, weights)

    def sample(self, module: Any, hidden: Float[Array, "B D"], keys: Key[Array, " B"]) -> Float[Array, "B D"]:
        return module(hidden)

    def multiply_adds(self, width: int) -> float:
        return width * width


def distance_loss(
    distance: Callable[[Array], Array],
    predicted: Float[Array, "B S D"],
    targets: Float[Array, "B S D"],
    weights: Float[Array, "B S"],
) -> HeadLoss:
    """The weighted mean of an elementwise distance over the dimensions, in float32."""
    terms = distance(predicted.astype(jnp.float32) - targets).mean(-1) * weights  # [B, S]
    return HeadLoss(terms.sum(), terms)


def _huber(x: Array) -> Array:
    size = jnp.abs(x)
    return jnp.where(size < 1.0, 0.5 * x * x, size - 0.5)


DISTANCES = {"l2": jnp.square, "l1": jnp.abs, "smooth_l1": _huber}


class Direction(nnx.Module):
    """A linear map D -> D, the log length of its samples, and the log scale of cosines where that is learnt."""

    def __init__(self, rngs: nnx.Rngs, width: int, dtype: str, init: str, temperature: float | None):
        self.linear = Linear(rngs, width, width, ("embed", "mlp"), dtype, as_torch=init == "reference")
        self.log_length = constant(0.5 * math.log(width), (1,), ("norm",), "float32")  # of standardised embeddings
        if temperature is not None:
            self.log_scale = constant(-math.log(temperature), (1,), ("norm",), "float32")

    def length_loss(self, lengths: Float[Array, "B S"]) -> Float[Array, "B S"]:
        """Squared error of the log length."""
        return jnp.square(self.log_length[...] - jnp.log(lengths + EPSILON))

    def sample(self, hidden: Float[Array, "B D"]) -> Float[Array, "B D"]:
        direction = _unit(self.linear(hidden).astype(jnp.float32))
        return (direction * jnp.exp(self.log_length[...])).astype(hidden.dtype)


def _unit(x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
    return x * jax.lax.rsqrt(jnp.square(x).sum(-1, keepdims=True) + EPSILON**2)


class _Directions(VisualHead):
    """What the heads that judge directions share: `Direction`, whose length learns beside their own loss."""

    def sample(self, module: Any, hidden: Float[Array, "B D"], keys: Key[Array, " B"]) -> Float[Array, "B D"]:
        return module.sample(hidden)

    def multiply_adds(self, width: int) -> float:
        """Those of the linear map; the products of InfoNCE's pairs depend on the number of rows."""
        return width * width

    def _with_length(
        self, module: Any, terms: Float[Array, "B S"], targets: Float[Array, "B S D"], weights: Float[Array, "B S"]
    ) -> HeadLoss:
        """The terms as a loss that also trains the length, which must not count as a loss of directions."""
        lengths = module.length_loss(jnp.linalg.norm(targets, axis=-1)) * weights
        only_gradient = lengths - jax.lax.stop_gradient(lengths)  # 0
        return HeadLoss((terms + only_gradient).sum(), terms)


@dataclasses.dataclass(frozen=True)
class Cosine(_Directions):
    """A linear map trained by the cosine with the target."""

    def make(self, rngs: nnx.Rngs, width: int, dtype: str, init: str) -> nnx.Module:
        return Direction(rngs, width, dtype, init, None)

    def loss(
        self,
        module: Any,
        hidden: Float[Array, "B S D"],
        targets: Float[Array, "B S D"],
        weights: Float[Array, "B S"],
        key: Key[Array, ""],
    ) -> HeadLoss:
        predicted = _unit(module.linear(hidden).astype(jnp.float32))
        terms = (1.0 - (predicted * _unit(targets)).sum(-1)) * weights
        return self._with_length(module, terms, targets, weights)


@dataclasses.dataclass(frozen=True)
class InfoNCE(_Directions):
    """A linear map trained to tell its target from all other targets of the step, on all devices.

    With micro-batches these are the targets of a micro-batch.

    Attributes:
      temperature: Temperature of the softmax, the initial one if it is learnt.
      learn_temperature: Whether it is.
    """

    temperature: float = 0.07
    learn_temperature: bool = True

    rows_mix = True

    def __post_init__(self):
        if not 1 / LARGEST_SCALE <= self.temperature <= 10:
            raise UserError(f"model.visual_head.temperature={self.temperature}; expected {1 / LARGEST_SCALE} to 10")

    def make(self, rngs: nnx.Rngs, width: int, dtype: str, init: str) -> nnx.Module:
        return Direction(rngs, width, dtype, init, self.temperature if self.learn_temperature else None)

    def loss(
        self,
        module: Any,
        hidden: Float[Array, "B S D"],
        targets: Float[Array, "B S D"],
        weights: Float[Array, "B S"],
        key: Key[Array, ""],
    ) -> HeadLoss:
        predicted = _unit(module.linear(hidden).astype(jnp.float32)).reshape(-1, hidden.shape[-1])  # [B*S, D]
        units = _unit(targets).reshape(predicted.shape)  # [B*S, D]
        scale = 1 / self.temperature
        if self.learn_temperature:
            scale = jnp.minimum(jnp.exp(module.log_scale[...]), LARGEST_SCALE)
        logits = jnp.einsum("pd,td->pt", predicted, units) * scale  # [B*S, B*S]
        logits = jnp.where(weights.reshape(1, -1) > 0, logits, -jnp.inf)
        own = (predicted * units).sum(-1) * scale  # [B*S]
        used = weights.reshape(-1) > 0
        # Without any target all logits are -inf, whose gradient is NaN even where it is not used.
        normaliser = jax.nn.logsumexp(jnp.where(used.any(), logits, 0.0), axis=-1)  # [B*S]
        terms = jnp.where(used, normaliser - own, 0.0).reshape(weights.shape) * weights
        return self._with_length(module, terms, targets, weights)
