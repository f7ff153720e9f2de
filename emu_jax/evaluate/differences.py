"""Means of a figure over runs, and differences between groups of runs: tests, corrected for their number.

    values by seed ─┬ mean_over ─ Mean              95% interval by Student's t
                    └ difference ─ Difference       p by a t test: paired where the seeds are the same, else Welch's
                             all of a table ─ corrected     Holm: a wrong "differs" in 5% of tables at most

A table of many tests finds differences by chance: of 40 tests of nothing, two at 5% each. Holm's adjusted p values keep
the chance of any such find in a whole table at 5%, whatever the tests share. What a test can find at all is its
`detectable` difference: a smaller one is missed more often than not in one of five tables.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.special import nctdtrinc, stdtr, stdtrit

LEVEL = 0.05  # of a table
POWER = 0.8


@dataclasses.dataclass(frozen=True)
class Mean:
    """A mean over runs: values by run (None: missing), 95% interval by Student's t (None: fewer than two values)."""

    values: tuple[float | None, ...]
    mean: float | None
    interval: tuple[float, float] | None


@dataclasses.dataclass(frozen=True)
class Difference:
    """A group's mean less another one's.

    Attributes:
      interval: 95%, of this difference alone.
      p: two-sided p value of this test alone; `adjusted` by Holm among the tests of a table.
      paired: whether it is the mean of differences between runs of the same seed.
      error, freedom: standard error and degrees of freedom of the t statistic.
      detectable: how large a difference must be for this test to find it with 80% power at the first step of the
        correction, if `error` were exact.
    """

    value: float
    interval: tuple[float, float]
    p: float
    paired: bool
    error: float
    freedom: float
    adjusted: float = math.nan
    detectable: float = math.nan

    @property
    def differs(self) -> bool:
        """Whether the table's correction leaves a difference."""
        return self.adjusted <= LEVEL


def mean_over(values: Sequence[float | None]) -> Mean:
    """The mean of the values that are not None."""
    known = np.array([value for value in values if value is not None], np.float64)
    if not len(known):
        return Mean(tuple(values), None, None)
    mean = float(known.mean())
    if len(known) < 2:
        return Mean(tuple(values), mean, None)
    return Mean(tuple(values), mean, _interval(mean, _error(known), len(known) - 1))


def difference(values: Mapping[Any, float], base: Mapping[Any, float]) -> Difference | None:
    """The difference of two groups' values by seed; None where one of them has fewer than two.

    Groups with the same seeds are paired: what a seed does to both, such as the order of the data, cancels out.
    """
    if min(len(values), len(base)) < 2:
        return None
    if paired := values.keys() == base.keys():
        changes = np.array([values[seed] - base[seed] for seed in values], np.float64)
        value, error, freedom = float(changes.mean()), _error(changes), len(changes) - 1.0
    else:
        mine, other = (np.array([*some.values()], np.float64) for some in (values, base))
        value, errors = float(mine.mean() - other.mean()), (_error(mine), _error(other))
        error = math.hypot(*errors)
        parts = errors[0] ** 4 / (len(mine) - 1) + errors[1] ** 4 / (len(other) - 1)
        freedom = error**4 / parts if parts else 1.0  # Welch's
    p = 2.0 * float(stdtr(freedom, -abs(value) / error)) if error else float(value == 0)
    return Difference(value, _interval(value, error, freedom), p, paired, error, freedom)


def corrected(differences: Sequence[Difference | None]) -> list[Difference | None]:
    """All differences of a table with Holm's adjusted p values, and what each could find."""
    tests = [found for found in differences if found is not None]
    adjusted = iter(holm([found.p for found in tests]))
    return [None if found is None else _with(found, next(adjusted), len(tests)) for found in differences]


def _with(found: Difference, adjusted: float, tests: int) -> Difference:
    critical = stdtrit(found.freedom, 1 - LEVEL / (2 * tests))
    size = float(nctdtrinc(found.freedom, 1 - POWER, critical))  # in standard errors: t is then noncentral
    return dataclasses.replace(found, adjusted=adjusted, detectable=size * found.error)


def holm(p: Sequence[float]) -> list[float]:
    """Holm's adjusted p values: the smallest times their number, the next times one less, and never decreasing.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    adjusted, highest = [0.0] * len(p), 0.0
    for rank, place in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        highest = max(highest, min(1.0, (len(p) - rank) * p[place]))
        adjusted[place] = highest
    return adjusted


def spreads(values: Mapping[tuple[int, int], float]) -> tuple[float, float] | None:
    """Standard deviations over initial weights and over the order of the data: each with the other seed held fixed.

    Args:
      values: by (seed of the weights, seed of the data).

    Returns: None unless two seeds or more of either kind occur with one of the other.
    """
    found = []
    for fixed in (1, 0):
        groups: dict[int, list[float]] = {}
        for seeds, value in values.items():
            groups.setdefault(seeds[fixed], []).append(value)
        variances = [float(np.var(some, ddof=1)) for some in groups.values() if len(some) > 1]
        if not variances:
            return None
        found.append(math.sqrt(float(np.mean(variances))))
    return found[0], found[1]


def _error(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / math.sqrt(len(values)))


def _interval(centre: float, error: float, freedom: float) -> tuple[float, float]:
    spread = float(stdtrit(freedom, 1 - LEVEL / 2)) * error
    return centre - spread, centre + spread
