"""Multiple choice by likelihood: options -> candidates and their scores -> the likeliest option -> accuracy.

A question's `candidates` are its options, and its answers are letters. Two protocols:

    letter   the prompt lists the options, and their letters are scored after it
    text     the prompt holds the question alone, and the options' texts are scored after it

A prediction holds the scores of M candidates by every rule of `generate/candidates.py`, {"sum": [M], …}. LLaMA's
tokenizer writes each letter as one token, so that the rules agree on letters; their sums decide. Texts differ in
length, so that each rule has figures of its own.
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from emu_jax.errors import UserError
from emu_jax.evaluate.formats.files import Entry
from emu_jax.evaluate.metrics.ranking import ranks
from emu_jax.evaluate.question import Question
from emu_jax.generate.candidates import RULES, CandidateScores

LETTERS = string.ascii_uppercase
BY_LETTER = "by letter"
BY_TEXT = {"sum": "by sum", "tokens": "by token", "reference": "by reference"}  # rule -> the end of a figure's name

Prediction = Mapping[str, Sequence[float]]


# ---- questions -------------------------------------------------------------------------------------------------------


def checked_options(entry: Entry, name: str, options: Sequence[str]) -> tuple[str, ...]:
    """Options that have a letter each; `name` is the field that an error names."""
    if not 1 <= len(options) <= len(LETTERS):
        raise entry.wrong(name, f"1 to {len(LETTERS)} options")
    return tuple(options)


def checked_letter(entry: Entry, name: str, options: Sequence[str]) -> str:
    """The field `name`, which must be the letter of one of the options."""
    if (letter := entry.text(name)) not in letters(options):
        raise entry.wrong(name, f"the letter of one of {len(options)} options, {', '.join(letters(options))}")
    return letter


def letters(options: Sequence[str]) -> tuple[str, ...]:
    """The letter of each option.

    >>> letters(["a cat", "a dog"])
    ('A', 'B')
    """
    return tuple(LETTERS[: len(options)])


def listed(options: Sequence[str], form: str) -> str:
    r"""Options as the lines of a prompt.

    >>> listed(["a cat", "a dog"], "({}) {}")
    '(A) a cat\n(B) a dog\n'
    """
    return "".join(form.format(*pair) + "\n" for pair in zip(LETTERS, options, strict=False))


# ---- predictions -----------------------------------------------------------------------------------------------------


def by_every_rule(scores: CandidateScores) -> dict[str, list[float]]:
    """A prediction."""
    return {rule: scores.by(rule).tolist() for rule in RULES}


def chosen(prediction: Prediction, rule: str) -> str:
    """The letter of the likeliest option, the first one of several.

    >>> chosen({"sum": [3.0, 1.5, 1.5]}, "sum")
    'B'
    """
    return letter_of(ranks(np.asarray(prediction[rule])).tolist())


def letter_of(order: Sequence[Any]) -> str:
    """Ranks of the options -> the letter of the best one.

    >>> letter_of([3, 1, 2])
    'B'
    """
    return LETTERS[order.index(1)]


def is_right(prediction: Any, question: Question, rule: str) -> bool:
    """Whether the likeliest option is the answer.

    Raises:
      UserError: there is not one score for each option.
    """
    if len(prediction[rule]) != len(question.candidates):
        raise UserError(
            f"question {question.id}: {len(prediction[rule])} scores for {len(question.candidates)} options; "
            "expected one each"
        )
    return chosen(prediction, rule) in question.answers


def chances(questions: Sequence[Question]) -> np.ndarray:
    """Float64 [N]: how often guessing finds each question's answer; 0 for those without options."""
    return np.array([1 / len(q.candidates) if q.candidates else 0.0 for q in questions])
