"""Shared by metrics: checks that predictions fit their questions, and figures by type of question.

predictions and questions, in the same order -> {"accuracy": Figure, "accuracy (yes/no)": Figure, ...}
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Mapping, Sequence

import numpy as np

from emu_jax.errors import UserError
from emu_jax.evaluate.intervals import Figure
from emu_jax.evaluate.question import Question

log = logging.getLogger(__name__)

Missing = dict[str, str]  # figure or group of figures that could not be computed -> why, in one line


def attempt(name: str, compute: Callable[[], Mapping[str, Figure]], missing: Missing) -> dict[str, Figure]:
    """The figures that `compute` returns; after a UserError none, with a warning and the reason in `missing`.

    The predictions took hours: what one metric lacks must not cost the others.

    Args:
      name: what the figures are called together.
    """
    try:
        return dict(compute())
    except UserError as error:
        missing[name] = " ".join(str(error).split())
        log.warning("%s is missing from the scores: %s", name, missing[name])
        return {}


def check(predictions: Sequence, questions: Sequence[Question]) -> None:
    """Raises UserError unless every question has one prediction and known answers."""
    if len(predictions) != len(questions):
        raise UserError(
            f"{len(predictions)} predictions for {len(questions)} questions; expected one each, in the same order"
        )
    if not questions:
        raise UserError("no predictions to score; expected at least one")
    for question in questions:
        if not question.answers:
            raise UserError(
                f"question {question.id}: its answers are not published, so it cannot be scored here; "
                "submit the predictions to the benchmark's server"
            )


def subjects(questions: Sequence[Question]) -> np.ndarray:
    """int [N]: the number of the images or the video that each question is about.

    Answers about one image, video or dialogue go right or wrong together, so that intervals resample these.
    """
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(_subject(question), len(numbers)) for question in questions])


def _subject(question: Question) -> Hashable:
    if question.video is not None:
        return str(question.video)
    if question.images:
        return tuple(id(image) if isinstance(image, np.ndarray) else image for image in question.images)
    return question.id, None  # no path is a pair


def by_kind(
    name: str,
    values: Sequence[float] | np.ndarray,
    questions: Sequence[Question],
    figure: Callable[..., Figure],
    chances: Sequence[float] | np.ndarray | None = None,
) -> dict[str, Figure]:
    """One figure over all values, and one for each type of question if there are several.

    Args:
      values: [N], one a question.
      figure: `intervals.mean` or `intervals.share`.
      chances: [N], what guessing gives for each question; None: unknown.
    """
    values, groups = np.asarray(values), subjects(questions)

    def over(chosen: np.ndarray) -> Figure:
        chance = None if chances is None else float(np.asarray(chances)[chosen].mean())
        return figure(values[chosen], chance, groups[chosen])

    figures = {name: over(np.ones(len(values), bool))}
    kinds = np.array([question.kind for question in questions])
    if len(names := sorted(set(kinds.tolist()))) > 1:
        for kind in names:
            figures[f"{name} ({kind or 'no type'})"] = over(kinds == kind)
    return figures
