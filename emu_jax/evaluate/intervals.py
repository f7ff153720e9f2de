"""Figures with 95% confidence intervals: Wilson's for shares, the percentile bootstrap for anything else.

Several questions about one image, video or dialogue say less than as many about different ones. With `groups`, the
bootstrap draws whole groups.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import numpy as np

Z95 = 1.959963984540054  # two-sided 95% quantile of the normal distribution


@dataclasses.dataclass(frozen=True)
class Figure:
    """One score.

    Attributes:
      interval: 95%.
      chance: the score of guessing; None where it is unknown.
      count: the number of items.
      paper_scale: what papers multiply the score by: 100 for shares, accuracies and CIDEr; 1 for FID and ranks.
    """

    value: float
    interval: tuple[float, float]
    chance: float | None
    count: int
    paper_scale: float = 1.0


def share(hits: Sequence[bool] | np.ndarray, chance: float | None = None, groups: np.ndarray | None = None) -> Figure:
    """A share of right answers.

    Args:
      groups: the number of each item's group; Wilson's interval holds only where every group has one item.

    >>> figure = share([True, True, True, False])
    >>> figure.value, [round(end, 3) for end in figure.interval], figure.count
    (0.75, [0.301, 0.954], 4)
    """
    hits = np.asarray(hits, bool)
    if _is_grouped(groups):
        return mean(hits, chance, groups)
    return Figure(float(hits.mean()), wilson(int(hits.sum()), len(hits)), chance, len(hits), 100.0)


def mean(
    values: Sequence[float] | np.ndarray,
    chance: float | None = None,
    groups: np.ndarray | None = None,
    paper_scale: float = 100.0,
) -> Figure:
    """A mean over items, for example of accuracies between 0 and 1.

    Args:
      groups: the number of each item's group.
      paper_scale: as in `Figure`.

    >>> mean([1.0, 0.0, 1.0, 1.0]).value
    0.75
    """
    values = np.asarray(values, np.float64)
    if groups is not None and _is_grouped(groups):
        sums, counts = _by_group(values, groups)
        interval = bootstrap(functools.partial(_mean_of_groups, sums, counts), len(sums))
    else:
        interval = bootstrap(lambda index: float(values[index].mean()), len(values))
    return Figure(float(values.mean()), interval, chance, len(values), paper_scale)


def of_totals(counts: np.ndarray, score: Callable[[np.ndarray], float], groups: np.ndarray | None = None) -> Figure:
    """A score that is computed from totals over items, for example F1 from counts of hits and errors.

    Args:
      counts: [N, K], a row an item.
      score: totals [K] -> the score; it must be defined for totals of 0 as well, which resamples may have.
      groups: the number of each item's group.

    >>> hits_and_errors = np.array([[1, 0], [1, 0], [0, 1], [1, 0]])
    >>> of_totals(hits_and_errors, lambda totals: totals[0] / max(totals.sum(), 1)).value
    0.75
    """
    counts = np.asarray(counts, np.float64)
    _, number = np.unique(np.arange(len(counts)) if groups is None else groups, return_inverse=True)  # [N]
    sums = np.zeros((number.max() + 1, counts.shape[1]))  # [G, K]
    np.add.at(sums, number, counts)
    interval = bootstrap(lambda index: float(score(sums[index].sum(0))), len(sums))
    return Figure(float(score(sums.sum(0))), interval, None, len(counts), 100.0)


def mean_of_kinds(
    values: Sequence[float] | np.ndarray, kinds: Sequence[str] | np.ndarray, groups: np.ndarray
) -> Figure:
    """The mean of the kinds' means, so that each kind counts the same however many items it has.

    Args:
      kinds: the kind of each item.
      groups: the number of each item's group, which is of one kind; the bootstrap draws whole groups within each kind.

    >>> mean_of_kinds([1.0, 0.0, 0.0, 0.0, 1.0], ["a", "a", "a", "a", "b"], np.arange(5)).value
    0.625
    """
    values, kinds, groups = np.asarray(values, np.float64), np.asarray(kinds), np.asarray(groups)
    means, draws = [], []
    for seed, kind in enumerate(dict.fromkeys(kinds.tolist())):
        chosen = kinds == kind
        means.append(values[chosen].mean())
        sums, counts = _by_group(values[chosen], groups[chosen])
        draws.append(_draws(functools.partial(_mean_of_groups, sums, counts), len(sums), seed=seed))
    low, high = np.percentile(np.mean(draws, axis=0), [2.5, 97.5])
    return Figure(float(np.mean(means)), (float(low), float(high)), None, len(values), 100.0)


def _by_group(values: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sums and counts of each group's values, [G] each."""
    _, number = np.unique(groups, return_inverse=True)  # [N]
    return np.bincount(number, values), np.bincount(number)


def _mean_of_groups(sums: np.ndarray, counts: np.ndarray, index: np.ndarray) -> float:
    return float(sums[index].sum() / counts[index].sum())


def _is_grouped(groups: np.ndarray | None) -> bool:
    return groups is not None and len(np.unique(groups)) < len(groups)


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """Wilson's score interval of a share; [0, 1] for 0 trials.

    >>> [round(end, 3) for end in wilson(118, 140)]
    [0.774, 0.894]
    """
    if trials == 0:
        return 0.0, 1.0
    share = successes / trials
    centre = share + Z95**2 / (2 * trials)
    spread = Z95 * math.sqrt(share * (1 - share) / trials + Z95**2 / (4 * trials**2))
    scale = 1 + Z95**2 / trials
    low = (centre - spread) / scale if successes else 0.0
    return low, (centre + spread) / scale if successes < trials else 1.0


def bootstrap(
    statistic: Callable[[np.ndarray], float],
    trials: int,
    *,
    draws: int = 1000,
    seed: int = 0,
    around: float | None = None,
) -> tuple[float, float]:
    """Percentile interval of `statistic(indices)` over `draws` resamples of `trials` items with replacement.

    Args:
      around: the statistic's value on all items, for a distance. A resample holds some items twice and others not at
        all, which makes every distance too large; so the percentiles are shifted by the difference between the
        resamples' mean and this value.
    """
    values = _draws(statistic, trials, draws, seed)
    shift = 0.0 if around is None else around - np.mean(values)
    low, high = np.percentile(values, [2.5, 97.5]) + shift
    return float(low), float(high)


def _draws(statistic: Callable[[np.ndarray], float], trials: int, draws: int = 1000, seed: int = 0) -> list[float]:
    rng = np.random.default_rng(seed)
    return [statistic(rng.integers(0, trials, trials)) for _ in range(draws)]
