"""Embeddings of any model in one fixed space: what they tell about an image, read in another model's embeddings.

    training images ─┬ the model's encoder  ─ [N, Q*D] ─┐
                     └ the frozen encoder   ─ [N, K] ───┴ ridge regression ─ any embeddings of the model -> [M, K]

Distances and R2 in each model's own space do not compare models: embeddings that tell less about an image are easier to
predict. Here all models are read by the same kind of linear map and searched in the same space. Two maps are fitted on
encoded training images. They differ in their penalty: for encoded images it is chosen by cross-validation, for
generated embeddings, which miss details that encoded ones have, on those generated from some training captions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from emu_jax.evaluate.metrics.ridge import Ridge
from emu_jax.generate.model import Emu

Embeddings = Float[np.ndarray, "N Q D"]
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


@dataclasses.dataclass(frozen=True)
class Reader:
    """The two maps of a model's embeddings into the fixed space."""

    encoded: Ridge
    generated: Ridge

    @classmethod
    def fit(
        cls, embeddings: Embeddings, targets: Vectors, keys: Sequence[str], generated: Embeddings, shown: np.ndarray
    ) -> Reader:
        """From a model's embeddings of N training images.

        Args:
          targets: the images in the fixed space.
          keys: the images' keys; cross-validation deals images to folds by them.
          generated: embeddings generated from the captions of some of these images.
          shown: int [M], the rows of these images.
        """
        flat = _flat(embeddings)
        return cls(Ridge.fit(flat, targets, keys), Ridge.fit_for(flat, targets, _flat(generated), targets[shown]))

    def read_encoded(self, embeddings: Embeddings) -> Vectors:
        """Embeddings of images in the fixed space."""
        return self.encoded(_flat(embeddings)) + self.encoded.centre

    def read_generated(self, embeddings: Embeddings) -> Vectors:
        """Generated embeddings in the fixed space."""
        return self.generated(_flat(embeddings)) + self.generated.centre


def _flat(embeddings: np.ndarray) -> np.ndarray:
    return embeddings.reshape(len(embeddings), -1)
