"""Detection scores of answers that say yes or no, by POPE's rule of 2023 (RUCAIBox/POPE, evaluate.py).

    a text -> yes or no -> accuracy, precision, recall and F1 of "yes", and the share of answers that say yes

The official program fails where no answer says yes, or none does rightly; precision and F1 are then 0 here.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from emu_jax.evaluate import intervals
from emu_jax.evaluate.intervals import Figure
from emu_jax.evaluate.metrics.figures import check, subjects
from emu_jax.evaluate.question import Question

YES, NO = "yes", "no"
NEGATIONS = frozenset(("No", "not", "no"))  # as they are written: "NO" and "isn't" say yes


def says_yes(text: str) -> bool:
    """Whether a text says yes: its first sentence, without commas, has none of three words between its spaces.

    >>> [says_yes(text) for text in ("yes", "No, there is none.", "there is not a dog", "NO", "Well. No")]
    [True, False, False, True, True]
    """
    words = text.split(".")[0].replace(",", "").split(" ")
    return NEGATIONS.isdisjoint(words)


# ---- scores of four counts: true positives, false positives, true negatives, false negatives


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _accuracy(counts: np.ndarray) -> float:
    return _ratio(counts[0] + counts[2], counts.sum())


def _precision(counts: np.ndarray) -> float:
    return _ratio(counts[0], counts[0] + counts[1])


def _recall(counts: np.ndarray) -> float:
    return _ratio(counts[0], counts[0] + counts[3])


def _f1(counts: np.ndarray) -> float:
    precision, recall = _precision(counts), _recall(counts)
    return _ratio(2 * precision * recall, precision + recall)


def _yes_ratio(counts: np.ndarray) -> float:
    return _ratio(counts[0] + counts[1], counts.sum())


SCORES = {
    "accuracy": _accuracy,
    "precision": _precision,
    "recall": _recall,
    "F1": _f1,
    "yes ratio": _yes_ratio,
}


def count(predictions: Sequence[str], questions: Sequence[Question]) -> np.ndarray:
    """[N, 4]: a 1 in the column of a true positive, false positive, true negative or false negative."""
    said = np.array([says_yes(text) for text in predictions])
    truth = np.array([question.answers[0] == YES for question in questions])
    return np.stack([said & truth, said & ~truth, ~said & ~truth, ~said & truth], axis=1).astype(np.float64)


def figures(predictions: Sequence[str], questions: Sequence[Question]) -> dict[str, Figure]:
    """Each score over all questions; where there are several kinds, by kind too, and the mean of the kinds' F1.

    Raises:
      UserError: a question has no prediction, or its answers are not published.
    """
    check(predictions, questions)
    counts, groups = count(predictions, questions), subjects(questions)
    found = {name: intervals.of_totals(counts, score, groups) for name, score in SCORES.items()}
    kinds = np.array([question.kind for question in questions])
    if len(names := list(dict.fromkeys(kinds.tolist()))) == 1:
        return found
    for kind in names:
        chosen = kinds == kind
        for name, score in SCORES.items():
            found[f"{name} ({kind})"] = intervals.of_totals(counts[chosen], score, groups[chosen])
    apart = np.concatenate([counts * (kinds == kind)[:, None] for kind in names], axis=1)  # [N, kinds x 4]

    def mean_f1(totals: np.ndarray) -> float:
        return float(np.mean([_f1(four) for four in totals.reshape(-1, 4)]))

    found["F1, mean of the kinds"] = intervals.of_totals(apart, mean_f1, groups)
    return found
