"""What the benchmarks of the embedded images share: questions about them, their splits, and exact match.

They need no files. Few-shot examples come from training images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from emu_jax.data.embedded_chats import Asked
from emu_jax.data.fluent_emoji import SPLITS as ALL_SPLITS
from emu_jax.data.fluent_emoji import Example
from emu_jax.evaluate import intervals
from emu_jax.evaluate.intervals import Figure
from emu_jax.evaluate.question import Question

HELD_OUT, TRAIN = "heldout_combinations", "train"
SPLITS = (HELD_OUT, *(split for split in ALL_SPLITS if split != HELD_OUT))
DESCRIBED = "emu_jax/data/fluent_emoji.py"


def make_question(example: Example, asked: Asked, suffix: str = "") -> Question:
    """A question about an image; `suffix` tells an image's questions apart by their ids."""
    answers = (asked.answer,)
    return Question(example.key + suffix, (example.pixels,), text=asked.question, answers=answers, kind=asked.kind)


def exact_matches(
    predictions: Sequence[str], questions: Sequence[Question], chances: Mapping[str, float]
) -> dict[str, Figure]:
    """Shares of predictions that are exactly the answer, for each kind of question; `chances` are of kinds."""
    figures: dict[str, Figure] = {}
    for kind in sorted({question.kind for question in questions}):
        right = [text == q.answers[0] for text, q in zip(predictions, questions, strict=True) if q.kind == kind]
        figures[f"exactly right ({kind})"] = intervals.share(right, chances.get(kind))
    return figures
