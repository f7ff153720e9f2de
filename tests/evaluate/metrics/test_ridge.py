"""Ridge regression against its normal equations, its choice of a penalty, and folds."""

from __future__ import annotations

import numpy as np
import pytest

from emu_jax.evaluate.metrics.ridge import PENALTIES, Ridge, assign_folds


@pytest.mark.parametrize("items, features", [(40, 6), (8, 20)])
def test_ridge_solves_the_normal_equations(items: int, features: int) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(3.0, 2.0, (items, features)), rng.normal(size=(items, 3))
    x[:, 0] = 5.0  # a constant feature
    ridge = Ridge.fit(x, y, [str(place) for place in range(items)])
    standardised = (x - x.mean(0)) / np.where(x.std(0) > 1e-9, x.std(0), 1.0)
    gram = standardised.T @ standardised + ridge.penalty * items * np.eye(features)
    expected = standardised @ np.linalg.solve(gram, standardised.T @ (y - y.mean(0)))
    np.testing.assert_allclose(ridge(x), expected, atol=1e-8)


def test_ridge_chooses_its_penalty() -> None:
    rng = np.random.default_rng(0)
    x, noise = rng.normal(size=(60, 20)), rng.normal(size=(60, 1))
    documents = [str(place) for place in range(60)]
    exact = Ridge.fit(x, x[:, :1], documents).penalty
    nothing = Ridge.fit(x, noise, documents).penalty
    assert exact == PENALTIES[0]
    assert nothing >= 1.0


def test_folds_are_even_and_stay() -> None:
    keys = [f"page-{number}.html" for number in range(17)]
    folds = assign_folds(keys, 5)
    assert sorted(np.bincount(list(folds.values()))) == [3, 3, 3, 4, 4]
    assert assign_folds([*reversed(keys), keys[0]], 5) == folds
