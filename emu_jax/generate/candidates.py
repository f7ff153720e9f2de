"""Scores of texts as continuations of a prompt, by three rules; by all of them, lower is likelier.

sum         negative log-likelihood of the candidate's tokens
tokens      the same for each token of the candidate
reference   the same for each token of prompt and candidate: what the reference's `predict` compares where a segment is
            one candidate (`n_segments=100`, as for VisDial), because its loss is a mean over the row
"""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Bool, Float, Int

from emu_jax.errors import UserError, nearest

RULES = ("reference", "sum", "tokens")


@dataclasses.dataclass(frozen=True)
class CandidateScores:
    """What M candidates score after one prompt.

    Attributes:
      sums: negative log-likelihoods, in float32.
      lengths: tokens of each candidate.
      prompt_length: tokens of the prompt, visual ones included.
      greedy: whether each token of a candidate is the likeliest one, so that greedy decoding begins with the candidate.
    """

    sums: Float[np.ndarray, " M"]
    lengths: Int[np.ndarray, " M"]
    prompt_length: int
    greedy: Bool[np.ndarray, " M"]

    def by(self, rule: str) -> Float[np.ndarray, " M"]:
        """The scores by one of `RULES`.

        Raises:
          UserError: there is no such rule.
        """
        if rule == "sum":
            return self.sums
        if rule == "tokens":
            return self.sums / np.maximum(self.lengths, 1)
        if rule == "reference":
            return self.sums / np.maximum(self.prompt_length + self.lengths - 1, 1)
        raise UserError(f"rule={rule!r}: expected one of {', '.join(RULES)}; did you mean {nearest(rule, RULES)}?")
