"""Discrete codes: the next embedding is one of finitely many, and predicting it is classification, as for a word.

    target ─ vector quantiser ─ codes [G]        loss = mean over groups of -log p(code | hidden)
    hidden ─ linear ─ logits [G, K] ─ a code each ─ codebook ─ restored embedding = the sample

A softmax can give several answers a large share, where regression gives their mean. SEED-LLaMA (Ge et al. 2023, arXiv
2310.01218) and LaVIT (Jin et al. 2023, arXiv 2309.04669) add the codes to the vocabulary of words. Here they have a
softmax of their own: at a position that predicts an embedding no word is possible, and no code elsewhere.

The language model reads restored embeddings where it predicts images, in training as in generation. The quantiser is
that of a `codebook` run (`config.init.codebook`), which stays as it is; without one it learns beside the model.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float, Int, Key

from emu_jax.errors import UserError
from emu_jax.models import vector_quantiser
from emu_jax.models.heads.head import HeadLoss, VisualHead
from emu_jax.models.layers import Array, Linear, parameter
from emu_jax.models.vector_quantiser import COMMITMENT, Codebook, VectorQuantiser


class CodePredictor(nnx.Module):
    """The map to logits, and the quantiser with its codebook [G, K, d], named `embedding` as the tokens' is."""

    def __init__(self, rngs: nnx.Rngs, width: int, sizes: Codebook, dtype: str):
        self.logits = Linear(rngs, width, sizes.groups * sizes.codes, ("embed", "vocab"), dtype, bias=True)
        self.quantiser = VectorQuantiser(rngs, width, sizes, "float32")
        shape = (sizes.groups, sizes.codes, sizes.width // sizes.groups)
        self.embedding = parameter(rngs, shape, ("norm", "codes", "norm"), "float32", std=1.0)


@dataclasses.dataclass(frozen=True)
class Codes(VisualHead):
    """Classification of the next embedding's codes.

    Attributes:
      codes, groups, width: sizes of the quantiser (`vector_quantiser.Codebook`); those of `config.init.codebook`.
      temperature: temperature of the softmax that a sample's codes are drawn from; 0 takes the likeliest.
      quantiser_weight: weight of the quantiser's own loss where it learns beside the model.
    """

    codes: int = 1024
    groups: int = 1
    width: int = 16
    temperature: float = 1.0
    quantiser_weight: float = 1.0

    differentiable = False

    def __post_init__(self):
        self.sizes.check("model.visual_head")
        if not self.temperature >= 0:
            raise UserError(f"model.visual_head.temperature={self.temperature}; expected 0 or more")
        if not self.quantiser_weight >= 0:
            raise UserError(f"model.visual_head.quantiser_weight={self.quantiser_weight}; expected 0 or more")

    @property
    def sizes(self) -> Codebook:
        return Codebook(self.codes, self.groups, self.width)

    @property
    def random(self) -> bool:
        return self.temperature > 0

    def make(self, rngs: nnx.Rngs, width: int, dtype: str, init: str) -> nnx.Module:
        return CodePredictor(rngs, width, self.sizes, dtype)

    def _logits(self, module: Any, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch G K"]:
        logits = module.logits(hidden).astype(jnp.float32)
        return logits.reshape(*hidden.shape[:-1], self.groups, self.codes)

    def loss(
        self,
        module: Any,
        hidden: Float[Array, "B S D"],
        targets: Float[Array, "B S D"],
        weights: Float[Array, "B S"],
        key: Key[Array, ""],
    ) -> HeadLoss:
        quantised = vector_quantiser.quantise(module.quantiser, module.embedding[...], targets)
        log_p = jax.nn.log_softmax(self._logits(module, hidden))  # [B, S, G, K]
        own = jnp.take_along_axis(log_p, quantised.codes[..., None], axis=-1)[..., 0]  # [B, S, G]
        terms = -own.mean(-1) * weights  # [B, S]
        learns = quantised.reconstruction + quantised.codebook + COMMITMENT * quantised.commitment
        learns = self.quantiser_weight * learns * weights
        only_gradient = learns - jax.lax.stop_gradient(learns)  # 0: the quantiser's loss is no loss of codes
        return HeadLoss((terms + only_gradient).sum(), terms)

    def sample(self, module: Any, hidden: Float[Array, "B D"], keys: Key[Array, " B"]) -> Float[Array, "B D"]:
        logits = self._logits(module, hidden)  # [B, G, K]
        if self.temperature:
            codes = jax.vmap(jax.random.categorical)(keys, logits / self.temperature)  # [B, G]
        else:
            codes = logits.argmax(-1)
        return module.quantiser.restore(vector_quantiser.look_up(codes, module.embedding[...])).astype(hidden.dtype)

    def inputs(
        self, module: Any, embeddings: Float[Array, "B S D"], numbers: Int[Array, "B S"]
    ) -> Float[Array, "B S D"]:
        """Restored embeddings, without a gradient: a sample has none to the encoder, either."""
        restored = vector_quantiser.quantise(module.quantiser, module.embedding[...], embeddings).restored
        return jax.lax.stop_gradient(restored).astype(embeddings.dtype)

    def multiply_adds(self, width: int) -> float:
        return width * self.groups * self.codes + self.input_multiply_adds(width)

    def input_multiply_adds(self, width: int) -> float:
        return vector_quantiser.multiply_adds(width, self.sizes)
