"""Options, letters and the likeliest option."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emu_jax.errors import UserError
from emu_jax.evaluate.formats.files import Entry
from emu_jax.evaluate.multiple_choice import by_every_rule, chances, checked_letter, checked_options, chosen, is_right
from emu_jax.evaluate.question import Question
from emu_jax.generate.candidates import CandidateScores
from emu_jax.storage import as_path

THREE = Question("1", answers=("C",), candidates=("one", "two words", "three words long"))


def test_rules_may_choose_other_options():
    """Sums prefer short texts, means over tokens long ones."""
    scores = CandidateScores(np.array([2.0, 3.0, 3.9], np.float32), np.array([1, 2, 4]), 10, np.zeros(3, bool))
    prediction = by_every_rule(scores)
    assert {rule: chosen(prediction, rule) for rule in prediction} == {"reference": "A", "sum": "A", "tokens": "C"}
    assert is_right(prediction, THREE, "tokens") and not is_right(prediction, THREE, "sum")


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=26))
def test_the_first_of_the_lowest_scores_is_chosen(scores):
    lowest = [number for number, score in enumerate(scores) if score == min(scores)]
    assert chosen({"sum": scores}, "sum") == "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[lowest[0]]


def test_what_cannot_be_chosen_from():
    with pytest.raises(UserError, match=r"^question 1: 2 scores for 3 options; expected one each$"):
        is_right({"sum": [1.0, 2.0]}, THREE, "sum")
    with pytest.raises(UserError, match=r"^candidate 1 has score nan; expected numbers to rank by$"):
        is_right({"sum": [1.0, float("nan"), 2.0]}, THREE, "sum")


def test_fields_with_options_and_letters():
    entry = Entry({"options": "many", "answer": "b"}, as_path("a.json"), "[3]")
    with pytest.raises(UserError, match=r"^a\.json: \[3\]\.options is 'many'; expected 1 to 26 options$"):
        checked_options(entry, "options", ["x"] * 27)
    with pytest.raises(
        UserError, match=r"^a\.json: \[3\]\.answer is 'b'; expected the letter of one of 2 options, A, B$"
    ):
        checked_letter(entry, "answer", ["x", "y"])


def test_chances():
    assert chances([THREE, Question("2")]).tolist() == [1 / 3, 0.0]
