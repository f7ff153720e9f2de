"""Intervals against published values and against simulation."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emu_jax.evaluate.intervals import bootstrap, mean, mean_of_kinds, of_totals, share, wilson


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


def test_questions_about_one_image_are_drawn_together():
    """60 images with 8 questions each, whose answers depend on the image: the interval is that of 60 means."""
    rng = np.random.default_rng(0)
    values = (rng.normal(size=(60, 1)) + 0.3 * rng.normal(size=(60, 8))).clip(-1, 1)
    groups = np.repeat(np.arange(60), 8)
    low, high = mean(values.ravel(), groups=groups).interval
    spread = 1.96 * values.mean(1).std() / np.sqrt(60)
    np.testing.assert_allclose((low, high), (values.mean() - spread, values.mean() + spread), atol=0.02)
    alone = mean(values.ravel()).interval
    print(f"width {high - low:.3f} over images, {alone[1] - alone[0]:.3f} over questions")
    assert high - low > 2 * (alone[1] - alone[0])


def test_groups_of_one_change_nothing():
    hits, values = np.array([True, False, True, True]), np.array([1.0, 0.0, 0.5, 0.25])
    assert share(hits, groups=np.arange(4)) == share(hits)
    assert mean(values, groups=np.arange(4)[::-1]) == mean(values)
    assert share(hits, groups=np.zeros(4, int)).interval == (0.75, 0.75)  # a single image says nothing of others


def test_a_mean_from_totals_is_the_mean():
    rng = np.random.default_rng(1)
    values, groups = rng.random(60), rng.integers(0, 20, 60)
    counts = np.stack([values, np.ones(60)], axis=1)
    found, expected = of_totals(counts, lambda totals: totals[0] / totals[1], groups), mean(values, groups=groups)
    np.testing.assert_allclose((found.value, *found.interval), (expected.value, *expected.interval))
    assert found.count == 60
    alone, each = of_totals(counts, lambda totals: totals[0] / totals[1]), mean(values)
    np.testing.assert_allclose((alone.value, *alone.interval), (each.value, *each.interval))


def test_around_takes_the_bias_of_a_distance_out():
    """The squared mean of 100 numbers around 0.5: resamples are too large by the variance of the mean, 0.01."""
    values = np.random.default_rng(0).normal(0.5, 1.0, 100)
    values += 0.5 - values.mean()

    def square(index):
        return float(values[index].mean() ** 2)

    plain, shifted = bootstrap(square, 100, draws=4000), bootstrap(square, 100, draws=4000, around=0.25)
    print(f"plain {plain}, shifted {shifted}")
    np.testing.assert_allclose(np.subtract(plain, shifted), 0.01, atol=0.004)


def test_each_kind_counts_the_same():
    """Kinds of 300 and of 60 prompts with four drawings each: the interval is that of two independent means."""
    rng = np.random.default_rng(0)
    means = [rng.random((count, 1)) < rate for count, rate in ((300, 0.8), (60, 0.3))]
    values = [(rng.random((len(some), 4)) < np.where(some, 0.9, 0.1)).astype(float) for some in means]
    found = mean_of_kinds(
        np.concatenate([some.ravel() for some in values]),
        ["a"] * 1200 + ["b"] * 240,
        np.repeat(np.arange(360), 4),
    )
    assert found.value == np.mean([some.mean() for some in values]) and found.count == 1440
    spread = 1.96 * np.sqrt(sum(some.mean(1).var() / len(some) for some in values)) / 2
    np.testing.assert_allclose(found.interval, (found.value - spread, found.value + spread), atol=0.01)
    assert mean_of_kinds([1.0, 0.0], ["a", "b"], np.arange(2)).interval == (0.5, 0.5)
