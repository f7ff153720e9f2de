"""Means, differences, and what the correction of a table keeps: by hand, by SciPy's tests, and by simulation."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from emu_jax.evaluate.differences import corrected, difference, holm, mean_over


def by_seed(*values: float) -> dict[int, float]:
    return dict(enumerate(values))


def test_mean_and_interval_of_three_values():
    """0.2, 0.3, 0.4: the deviation is 0.1, Student's t with 2 degrees of freedom 4.302653."""
    mean = mean_over([0.2, 0.3, 0.4])
    spread = 4.302653 * 0.1 / math.sqrt(3)
    assert mean.mean == pytest.approx(0.3)
    assert mean.interval == pytest.approx((0.3 - spread, 0.3 + spread), abs=1e-6)


@pytest.mark.parametrize(
    ("values", "mean", "interval"),
    [([0.5], 0.5, None), ([None, 0.5, None], 0.5, None), ([None, None], None, None), ([0.5, 0.5], 0.5, (0.5, 0.5))],
)
def test_few_values(values, mean, interval):
    found = mean_over(values)
    assert (found.mean, found.interval, found.values) == (mean, interval, tuple(values))


VALUES = st.lists(st.floats(-100, 100).map(lambda x: round(x, 3)), min_size=2, max_size=9)


@given(VALUES, VALUES)
def test_tests_are_scipys(mine, other):
    base = {f"other {n}": value for n, value in enumerate(other)}
    found = difference(by_seed(*mine), base)
    assert not found.paired and found.value == pytest.approx(np.mean(mine) - np.mean(other), abs=1e-9)
    if found.error > 1e-9:
        expected = stats.ttest_ind(mine, other, equal_var=False)
        assert found.p == pytest.approx(expected.pvalue, abs=1e-7)
        assert found.interval == pytest.approx(tuple(expected.confidence_interval()), abs=1e-6)
    changes = [a - b for a, b in zip(mine, other, strict=False)]
    found = difference(by_seed(*mine[: len(changes)]), by_seed(*other[: len(changes)]))
    assert found.paired
    if np.std(changes) > 1e-9:
        expected = stats.ttest_rel(mine[: len(changes)], other[: len(changes)])
        assert found.p == pytest.approx(expected.pvalue, abs=1e-7)
        assert found.interval == pytest.approx(tuple(expected.confidence_interval()), abs=1e-6)


def test_one_run_is_not_tested():
    assert difference(by_seed(0.5), by_seed(0.1, 0.2)) is None
    assert corrected([None, None]) == [None, None]


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.001, 0.7, 0.02]) == pytest.approx([1.0, 0.004, 1.0, 0.06])


def table(rng: np.random.Generator, shift: float = 0.0, groups: int = 10, figures: int = 4, seeds: int = 8) -> list:
    """A table's tests, of drawn figures whose base is shared and whose seeds have effects of their own.

    The first test's group is `shift` standard deviations better.
    """
    effects = rng.normal(size=(figures, seeds))
    base, other = (effects + rng.normal(size=(n, figures, seeds)) for n in (1, groups))
    other[0, 0] += shift
    return corrected(
        [difference(by_seed(*other[g, f]), by_seed(*base[0, f])) for g in range(groups) for f in range(figures)]
    )


def test_a_table_of_nothing_finds_something_in_five_of_a_hundred():
    """1,000 tables of 40 tests where no group differs from the base."""
    rng = np.random.default_rng(0)
    tables = [table(rng) for _ in range(1000)]
    wrong = np.mean([any(found.differs for found in tests) for tests in tables])
    alone = np.mean([any(found.p <= 0.05 for found in tests) for tests in tables])
    print(f"tables with a wrong find: {wrong:.1%}; without the correction {alone:.1%}")
    assert wrong <= 0.055
    assert alone > 0.5


def test_power_is_what_the_table_says():
    """A difference of the size that the table gives is found in about four of five tables."""
    rng = np.random.default_rng(1)
    found = table(rng)[0]
    size = found.detectable / found.error * math.sqrt(2 / 8)  # the true standard error of 8 differences of two draws
    power = np.mean([table(rng, size)[0].differs for _ in range(400)])
    print(f"a shift of {size:.2f} standard deviations is found in {power:.0%} of 400 tables")
    assert 0.7 < power < 0.95
