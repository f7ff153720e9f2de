"""Ranking: scores [N] of candidates, lower is better -> ranks [N] from 1 -> R@1/5/10, mean rank, MRR, NDCG.

The rules are those of the Visual Dialog challenge's starter code (visdialch/metrics.py): all figures but NDCG use the
rank of the one true answer; NDCG uses every candidate that people judged relevant.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from emu_jax.errors import UserError
from emu_jax.evaluate import intervals
from emu_jax.evaluate.intervals import Figure
from emu_jax.evaluate.metrics.figures import check, subjects
from emu_jax.evaluate.question import Question

RECALL = (1, 5, 10)


def ranks(scores: np.ndarray) -> np.ndarray:
    """Scores [N], such as summed negative log-likelihoods -> int [N], 1 the best; equal scores keep their order.

    >>> ranks(np.array([2.5, 0.1, 7.0]))
    array([2, 1, 3])

    Raises:
      UserError: a score is nan.
    """
    scores = np.asarray(scores)
    if np.isnan(scores).any():
        raise UserError(f"candidate {int(np.isnan(scores).argmax())} has score nan; expected numbers to rank by")
    found = np.empty(len(scores), np.int64)
    found[np.argsort(scores, kind="stable")] = np.arange(1, len(scores) + 1)
    return found


def ndcg(ranks: np.ndarray, relevance: Sequence[float]) -> float:
    """Normalised discounted cumulative gain of the first K ranks; K is the number of candidates with any relevance.

    >>> ndcg(np.array([1, 2, 3]), [1.0, 0.0, 0.0]), round(ndcg(np.array([2, 1, 3]), [1.0, 0.0, 0.5]), 3)
    (1.0, 0.48)

    Args:
      ranks: int [N] from 1.
      relevance: [N] from 0 to 1, at least one above 0.
    """
    relevance = np.asarray(relevance, np.float64)
    k = int((relevance != 0).sum())
    discounts = np.log2(np.arange(k) + 2)  # [K]
    gain = (relevance[np.argsort(ranks)][:k] / discounts).sum()
    return float(gain / (np.sort(relevance)[::-1][:k] / discounts).sum())


def figures(scores: Sequence[np.ndarray], questions: Sequence[Question]) -> dict[str, Figure]:
    """R@k, mean rank and MRR over all questions, NDCG over those whose candidates' relevance is known.

    NDCG is undefined if no candidate is relevant: it leaves such questions out, and its `count` is of the others.
    Chance is that of a random order.

    Args:
      scores: for each question [N], one score a candidate.
      questions: their first answer is one of their candidates.

    Raises:
      UserError: there is not one score or relevance for each candidate, or the answer is no candidate.
    """
    check(scores, questions)
    targets, gains = [], []
    for values, question in zip(scores, questions, strict=True):
        _check_candidates(values, question)
        order = ranks(values)
        targets.append(order[question.candidates.index(question.answers[0])])
        if any(question.relevance):
            gains.append(ndcg(order, question.relevance))
    targets = np.array(targets)
    sizes = np.array([len(question.candidates) for question in questions])
    dialogues = subjects(questions)
    found = {}
    for k in RECALL:
        chance = float(np.minimum(k / sizes, 1.0).mean())
        found[f"R@{k}"] = intervals.share(targets <= k, chance, dialogues)
    found["mean rank"] = intervals.mean(targets, float((sizes + 1).mean() / 2), dialogues, paper_scale=1.0)
    harmonic = [(1 / np.arange(1, size + 1)).mean() for size in sizes]
    found["MRR"] = intervals.mean(1 / targets, float(np.mean(harmonic)), dialogues)
    if gains:
        found["NDCG"] = intervals.mean(gains)
    return found


def _check_candidates(values: np.ndarray, question: Question) -> None:
    count = len(question.candidates)
    if len(values) != count:
        raise UserError(f"question {question.id}: {len(values)} scores for {count} candidates; expected one each")
    if question.relevance and len(question.relevance) != count:
        raise UserError(
            f"question {question.id}: relevance of {len(question.relevance)} of {count} candidates; expected all"
        )
    if question.answers[0] not in question.candidates:
        raise UserError(f"question {question.id}: its answer {question.answers[0]!r} is not among its candidates")
