"""What a visual head is: parameters on top of the hidden states, a loss in training and a sample in generation.

                   ┌ loss:   distance to, or likelihood of, the next input embedding
hidden states ─ head
                   └ sample: the next embedding, which the language model reads next
"""

from __future__ import annotations

import abc
import dataclasses
from typing import ClassVar, NamedTuple

from flax import nnx
from jaxtyping import Float, Int, Key

from emu_jax.models.layers import Array


class HeadLoss(NamedTuple):
    """A head's loss over some positions.

    Attributes:
      total: Weighted sum.
      terms: Its term at every position.
    """

    total: Float[Array, ""]
    terms: Float[Array, "B S"]


@dataclasses.dataclass(frozen=True)
class VisualHead(abc.ABC):
    """Settings of a head (`config.model.visual_head`) and what it computes; hashable, as `EmuConfig` is.

    Subclasses are frozen dataclasses, whose fields are the head's settings. `registry.py` explains how to add one.

    Attributes:
      name: The head's name in the registry.
      rows_mix: Whether a row's loss depends on the other rows, so that all rows of a step must be together.
      differentiable: Whether a sample has a gradient to its hidden state.
      reads_samples: Whether the language model reads the samples themselves, in generation (`next_input`).
    """

    name: str

    rows_mix: ClassVar[bool] = False
    differentiable: ClassVar[bool] = True
    reads_samples: ClassVar[bool] = True

    @property
    def random(self) -> bool:
        """Whether the loss or the samples are random."""
        return False

    @property
    def most_queries(self) -> int | None:
        """The largest number of embeddings of an image that the head can predict; None: any."""
        return None

    @abc.abstractmethod
    def make(self, rngs: nnx.Rngs, width: int, dtype: str, init: str) -> nnx.Module:
        """Declares the parameters for hidden states and embeddings of one width, as `EmuConfig.init` says."""

    @abc.abstractmethod
    def loss(
        self,
        module: nnx.Module,
        hidden: Float[Array, "B S D"],
        targets: Float[Array, "B S D"],
        weights: Float[Array, "B S"],
        key: Key[Array, ""],
    ) -> HeadLoss:
        """The loss of predicting `targets` (float32, without a gradient) from `hidden`, in float32.

        Args:
          weights: weight of the loss at a position; 0 where it predicts no embedding.
          key: randomness, if the head is `random`.
        """

    @abc.abstractmethod
    def sample(self, module: nnx.Module, hidden: Float[Array, "B D"], keys: Key[Array, " B"]) -> Float[Array, "B D"]:
        """The next embedding, in the dtype of `hidden`. A row depends on its own hidden state and key alone."""

    def inputs(
        self, module: nnx.Module, embeddings: Float[Array, "B S D"], numbers: Int[Array, "B S"]
    ) -> Float[Array, "B S D"]:
        """What the language model reads, in training, in the place of the embeddings of an image that it predicts.

        That is the embeddings themselves, unless a sample can never be equal to them, as one of finitely many codes, or
        is not what is read next.

        Args:
          numbers: the embeddings' numbers within their image, 0 to Q - 1; any number where there is no embedding.
        """
        return embeddings

    def next_input(
        self, module: nnx.Module, sample: Float[Array, "B D"], number: Int[Array, ""]
    ) -> Float[Array, "B D"]:
        """What the language model reads, in generation, after it has drawn a sample: embedding `number` of an image."""
        return sample

    def input_multiply_adds(self, width: int) -> float:
        """Multiply-adds of `inputs` at a position."""
        return 0.0

    @abc.abstractmethod
    def multiply_adds(self, width: int) -> float:
        """Multiply-adds of the loss's forward pass at a position."""
