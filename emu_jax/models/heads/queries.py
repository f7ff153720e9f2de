"""Learnable queries: the language model reads Q learnt vectors where an image is to be, not its own embeddings.

    … [IMG] q_0 q_1 … q_(Q-1)      read, the same for all images
        e_0 e_1 e_2 …              predicted, each from the position before it

The embeddings of an image then depend on what comes before the image, and not on each other, so that no error adds up
in generation. DreamLLM (Dong et al. 2023, arXiv 2309.11499) and GILL (Koh et al. 2023, arXiv 2305.17216) ask a language
model for an image in this way, and train it through the visual decoder (`train/tasks/end_to_end.py`). Without a decoder
the loss is that of l2 regression.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float, Int, Key

from emu_jax.errors import UserError
from emu_jax.models.heads.head import HeadLoss, VisualHead
from emu_jax.models.heads.regression import distance_loss
from emu_jax.models.layers import Array, Linear, parameter


class QueryRegression(nnx.Module):
    """A linear map D -> D and the queries [N, D], named `embedding` as the tokens' is."""

    def __init__(self, rngs: nnx.Rngs, width: int, count: int, dtype: str, init: str):
        self.linear = Linear(rngs, width, width, ("embed", "mlp"), dtype, as_torch=init == "reference")
        self.embedding = parameter(rngs, (count, width), ("queries", "embed"), dtype, std=1.0)


@dataclasses.dataclass(frozen=True)
class Queries(VisualHead):
    """A linear map and learnable queries.

    Attributes:
      count: number of queries; an image's embeddings are at most so many.
    """

    count: int = 64

    reads_samples = False

    def __post_init__(self):
        if self.count < 1:
            raise UserError(f"model.visual_head.count={self.count}; expected 1 or more")

    @property
    def most_queries(self) -> int:
        return self.count

    def make(self, rngs: nnx.Rngs, width: int, dtype: str, init: str) -> nnx.Module:
        return QueryRegression(rngs, width, self.count, dtype, init)

    def loss(
        self,
        module: Any,
        hidden: Float[Array, "B S D"],
        targets: Float[Array, "B S D"],
        weights: Float[Array, "B S"],
        key: Key[Array, ""],
    ) -> HeadLoss:
        return distance_loss(jnp.square, module.linear(hidden), targets, weights)

    def sample(self, module: Any, hidden: Float[Array, "B D"], keys: Key[Array, " B"]) -> Float[Array, "B D"]:
        return module.linear(hidden)

    def inputs(
        self, module: Any, embeddings: Float[Array, "B S D"], numbers: Int[Array, "B S"]
    ) -> Float[Array, "B S D"]:
        return module.embedding[...][jnp.clip(numbers, 0, self.count - 1)].astype(embeddings.dtype)

    def next_input(self, module: Any, sample: Float[Array, "B D"], number: Int[Array, ""]) -> Float[Array, "B D"]:
        return jnp.broadcast_to(module.embedding[...][number].astype(sample.dtype), sample.shape)

    def multiply_adds(self, width: int) -> float:
        return width * width
