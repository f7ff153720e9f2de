"""CLIP score: how well drawn images fit the texts they were drawn from, by a CLIP that the user gives.

    images uint8 [H, W, 3] and texts, in the same order -> mean of max(100 cos, 0)

Scores of different CLIPs are not comparable: report the weights with the number.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from emu_jax.data.clip_scores import ClipScorer
from emu_jax.errors import UserError
from emu_jax.evaluate import intervals
from emu_jax.evaluate.intervals import Figure

CLIP_SCORE = "CLIP score"


def figure(scorer: ClipScorer, images: Iterable[np.ndarray], texts: Sequence[str]) -> Figure:
    """Mean CLIP score, from 0 to 100.

    Raises:
      UserError: the numbers of texts and images differ, or there are none.
    """
    seen, read = scorer.embed_images(images), scorer.embed_texts(texts)  # [N, D] each, of length 1
    if len(seen) != len(read) or not len(seen):
        raise UserError(f"CLIP score: {len(seen)} images and {len(read)} texts; expected one text an image")
    return intervals.mean(np.maximum(100 * (seen * read).sum(-1), 0.0))
