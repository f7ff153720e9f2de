"""Exact match of short answers."""

import pytest

from emu_jax.evaluate.intervals import wilson
from emu_jax.evaluate.metrics import open_answers
from emu_jax.evaluate.question import Question


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("A dog.", "dog", True),
        ("2", "two", True),
        ("two", "two", True),
        ("dogs", "dog", False),
        ("dog barks", "dog", False),
        ("a", "a", True),
        ("", "a", False),
        ("the", "a", False),
    ],
)
def test_matches(prediction, answer, expected):
    assert open_answers.matches(prediction, [answer]) is expected


def test_figures():
    questions = [Question(str(n), answers=(a,), kind=k) for n, (a, k) in enumerate([("man", "who"), ("ball", "what")])]
    figures = open_answers.figures(["Man", "a bat"], questions)
    assert {name: figure.value for name, figure in figures.items()} == {
        "accuracy": 0.5,
        "accuracy (what)": 0.0,
        "accuracy (who)": 1.0,
    }
    assert figures["accuracy"].interval == wilson(1, 2)
