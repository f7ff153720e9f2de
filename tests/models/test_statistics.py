"""How predictions vary beside their targets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emu_jax.models.statistics import prediction_metrics

TARGETS = jax.random.normal(jax.random.key(0), (200, 6))
USED = jnp.arange(200) < 150


@pytest.mark.parametrize(
    ("predicted", "variance", "rank"),
    [
        (TARGETS, 1.0, 1.0),
        (0.5 * TARGETS + 3.0, 0.25, 1.0),
        (jnp.zeros_like(TARGETS), 0.0, 0.0),
    ],
)
def test_ratios_of_variance_and_rank(predicted, variance, rank):
    found = prediction_metrics(predicted, TARGETS, USED)
    assert float(found["predicted_variance"]) == pytest.approx(variance, rel=1e-4)
    assert float(found["predicted_rank"]) == pytest.approx(rank, rel=1e-4)


def test_predictions_on_a_line_have_one_direction():
    line = TARGETS[:, :1] * jnp.arange(1.0, 7.0)
    targets = np.asarray(TARGETS)[:150] - np.asarray(TARGETS)[:150].mean(0)
    spectrum = np.linalg.eigvalsh(targets.T @ targets)
    expected = 1 / (spectrum.sum() ** 2 / (spectrum**2).sum())
    assert float(prediction_metrics(line, TARGETS, USED)["predicted_rank"]) == pytest.approx(expected, rel=1e-3)


def test_what_is_not_used_does_not_count():
    elsewhere = jnp.where(USED[:, None], TARGETS, 99.0)
    found = prediction_metrics(elsewhere, TARGETS, USED)
    assert float(found["predicted_variance"]) == pytest.approx(1.0, rel=1e-4)


def test_nothing_used_is_no_nan():
    found = prediction_metrics(TARGETS, TARGETS, jnp.zeros(200, bool))
    assert all(np.isfinite(float(value)) for value in found.values()), found
