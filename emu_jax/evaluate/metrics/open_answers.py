"""Exact match of short open answers: the share of predictions equal to an answer.

Both are normalised as for VQA, because published answers are bare lower-case words and models write "A dog." or "2".
"""

from __future__ import annotations

from collections.abc import Sequence

from emu_jax.evaluate import intervals
from emu_jax.evaluate.intervals import Figure
from emu_jax.evaluate.metrics import vqa
from emu_jax.evaluate.metrics.figures import by_kind, check
from emu_jax.evaluate.question import Question


def matches(prediction: str, answers: Sequence[str]) -> bool:
    """Whether a prediction is one of the answers."""
    return _normal(prediction) in {_normal(answer) for answer in answers}


def _normal(text: str) -> str:
    # An answer that is only an article (the files have "a") stays.
    return vqa.normalise(text) or vqa.tidy(text).lower()


def figures(predictions: Sequence[str], questions: Sequence[Question]) -> dict[str, Figure]:
    """Top-1 accuracy over all questions and by type (what, who, how, ...), from 0 to 1.

    Raises:
      UserError: a question has no prediction, or its answers are not published.
    """
    check(predictions, questions)
    hits = [matches(text, question.answers) for text, question in zip(predictions, questions, strict=True)]
    return by_kind("accuracy", hits, questions, intervals.share)
