"""Intervals against published values and against simulation."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emu_jax.evaluate.intervals import bootstrap, wilson


@pytest.mark.parametrize(
    ("successes", "trials", "expected"),
    [(81, 263, (0.2553, 0.3662)), (15, 148, (0.0624, 0.1605)), (0, 20, (0.0, 0.1611)), (1, 29, (0.0061, 0.1718))],
)
def test_wilson_matches_newcombe_1998_table_1(successes, trials, expected):
    np.testing.assert_allclose(wilson(successes, trials), expected, atol=5e-5)


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_holds_the_share(case):
    successes, trials = case
    low, high = wilson(successes, trials)
    assert 0.0 <= low <= successes / trials <= high <= 1.0


def test_bootstrap_of_a_mean_is_the_normal_interval():
    values = np.random.default_rng(0).normal(3.0, 2.0, 400)
    low, high = bootstrap(lambda index: values[index].mean(), 400, draws=4000)
    spread = 1.96 * values.std() / 20
    np.testing.assert_allclose((low, high), (values.mean() - spread, values.mean() + spread), atol=0.03)
