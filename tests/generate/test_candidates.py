"""The rules by which candidates are ranked."""

import numpy as np
import pytest

from emu_jax.errors import UserError
from emu_jax.generate.candidates import CandidateScores

# After a prompt of 150 tokens: 5.00 nats over 2 tokens, and 5.15 over 7.
SCORES = CandidateScores(np.array([5.0, 5.15]), np.array([2, 7]), 150, np.array([False, False]))


@pytest.mark.parametrize(("rule", "expected"), [("sum", 0), ("tokens", 1), ("reference", 1)])
def test_the_best_depends_on_the_rule(rule, expected):
    assert SCORES.by(rule).argmin() == expected, SCORES.by(rule)


def test_the_reference_divides_by_the_row_without_its_first_token():
    """Its loss is the mean over the shifted labels: a prompt's count as zeros."""
    rows = [np.concatenate([np.zeros(149), np.full(length, total / length)]) for total, length in ((5.0, 2), (5.15, 7))]
    np.testing.assert_allclose(SCORES.by("reference"), [row.mean() for row in rows], rtol=1e-6)


def test_an_unknown_rule_is_named():
    with pytest.raises(UserError, match=r"rule='token': expected one of reference, sum, tokens; did you mean tokens\?"):
        SCORES.by("token")
