"""MMMU's rule for open questions: 120 drawn responses, against what the official program says of them."""

import random

import pytest

from emu_jax.evaluate.metrics import open_responses

# fmt: off
PIECES = (
    "The answer is ", "so ", "Therefore ", "final result ", "x = ", "it could be ", "thus ", "about ", "this ", "also ",
    "\n", ". ", ".", ", ", ":", "?", "'", "=", " m", "%", "$", "\t", "  ",
    "1,200", "1,200.456", "12.970", "3.4286", "-141", "-141.004", "6.333", "6.33", "1e3", "1.2E-3", "0.286", ".5", "30",
    "30.0", "nan", "inf", "1_000", "\uff12", "1,2,3", "12,3456",
    "$MgS$", "MgS", "Tampa, Florida", "trans-1-Chloro", "B", "(B)", " b ", "24/7", "Transformation", "embryonic",
    "\xe9", "\u0130",
)
ANSWERS = (
    "C", "B", "Transformation", "24/7", "3.429", "trans-1-Chloro", "12.97", "$MgS$", "MgS", "-141", "6.333", "1000",
    "0.286", "Tampa", "Florida", "embryonic", "30.0", "1,200", "0.5", "nan", "2", "0.0012",
)
# fmt: on


def cases() -> list[tuple[str, list[str]]]:
    """Responses of up to nine pieces, and one or two answers, half of which they hold in some form."""
    rng = random.Random(0)
    found = []
    for _ in range(120):
        answers = rng.sample(ANSWERS, rng.choice([1, 1, 2]))
        pieces = rng.choices(PIECES, k=rng.randint(0, 8))
        if rng.random() < 0.6:
            answer = rng.choice(answers)
            pieces.insert(
                rng.randint(0, len(pieces)), rng.choice([answer, answer.upper(), f" {answer} ", answer + "0"])
            )
        found.append(("".join(pieces), answers))
    return found


# MMMU's mmmu/utils/eval_utils.py at bb0b95a9: 1 where `eval_open` is right about what `parse_open_response` found; and
# how many strings and how many numbers that are.
RIGHT = (
    "100001101100110011000001111101100110000010000011000000010010"
    "101110101100000010010010001101110000101111110001010111000010"
)
FOUND = (
    "10 12 01 12 13 10 14 20 20 15 14 10 11 11 10 01 15 02 12 02 04 10 11 01 12 10 20 15 20 13 11 12 10 "
    "10 12 10 12 10 12 10 11 12 01 10 12 01 10 10 12 20 12 10 10 10 12 11 20 10 11 10 13 02 11 01 11 13 "
    "01 01 12 12 10 13 12 14 10 11 03 13 13 10 11 12 13 10 10 11 10 10 14 10 11 10 10 14 11 10 12 12 11 "
    "01 10 10 12 12 11 10 20 10 10 12 12 01 12 11 11 10 11 10 13 11"
)


def test_official_figures():
    assert [open_responses.is_right(response, answers) for response, answers in cases()] == [
        mark == "1" for mark in RIGHT
    ]


def test_official_parts():
    counts = []
    for response, _ in cases():
        found = open_responses.parts(response)
        counts.append("".join(str(sum(isinstance(part, kind) for part in found)) for kind in (str, float)))
    assert " ".join(counts) == FOUND


# What `parse_open_response` gives, in our order.
PARTS: list[tuple[str, list[str | float]]] = [
    ("The answer is 1,200.456 m.", ["1,200.456 m", 1200.0, 200.46]),
    ("x = 3", [3.0]),
    ("x = 3\ny = 4", [4.0]),
    ("so it is \nB", ["so it is \nb"]),
    ("Therefore, the result is: ", ["is:"]),
    ("the answer is .", ["is"]),
    ("It is A. So it is B.", [" b", "b "]),
    ("Tampa, Florida", ["tampa, florida"]),
    ("", [""]),
]


@pytest.mark.parametrize(("response", "expected"), PARTS)
def test_parts(response, expected):
    assert open_responses.parts(response) == expected
