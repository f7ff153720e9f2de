"""Embeddings of any model in one fixed space: what they tell about an image, read in another model's embeddings.

    training images ─┬ the model's encoder  ─ [N, Q*D] ─┐
                     └ the frozen encoder   ─ [N, K] ───┴ ridge regression ─ any embeddings of the model -> [M, K]

Distances and R2 in each model's own space do not compare models: embeddings that tell less about an image are easier to
predict. Here all models are read by the same kind of linear map and searched in the same space. The map is fitted on
encoded training images and applied to generated embeddings too, so a model whose generated embeddings differ from its
encoded ones in kind is read worse.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from emu_jax.evaluate.metrics.ridge import Ridge
from emu_jax.generate.model import Emu

Vectors = Float[np.ndarray, "N K"]


@dataclasses.dataclass(frozen=True)
class FixedSpace:
    """A frozen encoder.

    Attributes:
      name: what the figures call it.
      emu: the model whose encoder it is.
    """

    name: str
    emu: Emu


def reader(embeddings: Float[np.ndarray, "N Q D"], targets: Vectors, keys: Sequence[str]) -> Ridge:
    """The map from a model's embeddings of N training images into the fixed space, where they are `targets`.

    Args:
      keys: the images' keys; cross-validation deals images to folds by them.
    """
    return Ridge.fit(embeddings.reshape(len(embeddings), -1), targets, keys)


def read(ridge: Ridge, embeddings: Float[np.ndarray, "M Q D"]) -> Float[np.ndarray, "M K"]:
    """A model's embeddings in the fixed space."""
    return ridge(embeddings.reshape(len(embeddings), -1)) + ridge.centre
