"""Yes or no, and its scores: expected values are what POPE's evaluate.py printed (RUCAIBox/POPE, commit 3df3ba1b)."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emu_jax.errors import UserError
from emu_jax.evaluate.metrics import yes_no
from emu_jax.evaluate.question import Question

# fmt: off
PIECES = (
    "yes", "Yes", "no", "No", "NO", "not", "Not", "none", "isn't", "there is", "a dog", ",", "no,", ",no", ".", ". ",
    "no.", "Yes.", "\n", "no\n", " ", "  ", "knot", "No, there is no", "Yes, there is", "n.o", "unsure", "",
    "not.", "-no",
)
# fmt: on


def cases() -> list[tuple[str, str, int]]:
    """Predictions of one to four pieces, right answers and the numbers of the images."""
    rng = random.Random(2)
    return [
        (rng.choice(["", " "]).join(rng.choices(PIECES, k=rng.randint(1, 4))), rng.choice(["yes", "no"]), n // 6)
        for n in range(120)
    ]


def questions(labels, images) -> list[Question]:
    pixels = {image: np.zeros((1, 1, 3), np.uint8) for image in images}
    return [Question(str(n), (pixels[i],), answers=(a,)) for n, (a, i) in enumerate(zip(labels, images, strict=True))]


# y or n, a prediction each
SAID = (
    "nyyynynnnnnnyyyynynynnyyynyyynyyyyyyynynnyyyyynynyyynynnynyy"
    "nynnynnynynnnnyyynyynnyynynnyynnnyyyyyyyyynyyyyyyyyyynyynyyy"
)
OFFICIAL = {  # from 44 true positives, 31 false positives, 23 true negatives, 22 false negatives
    "accuracy": 0.5583333333333333,
    "precision": 0.5866666666666667,
    "recall": 0.6666666666666666,
    "F1": 0.6241134751773049,
    "yes ratio": 0.625,
}


def test_drawn_answers_are_read_as_the_official_program_reads_them():
    found = "".join("y" if yes_no.says_yes(text) else "n" for text, *_ in cases())
    print([(text, a, b) for (text, *_), a, b in zip(cases(), found, SAID, strict=True) if a != b])
    assert found == SAID


def test_scores_are_the_official_ones():
    texts, labels, images = zip(*cases(), strict=True)
    figures = yes_no.figures(texts, questions(labels, images))
    print({name: figure.value for name, figure in figures.items()}, OFFICIAL)
    assert {name: figure.value for name, figure in figures.items()} == OFFICIAL
    for figure in figures.values():
        assert figure.interval[0] < figure.value < figure.interval[1] and figure.count == 120


@settings(max_examples=25)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=20))
def test_scores_by_their_definitions(pairs):
    """Against plain counts; where the official program divides by 0 the score is 0."""
    said, truth = zip(*pairs, strict=True)
    asked = questions(["yes" if yes else "no" for yes in truth], range(len(pairs)))
    figures = yes_no.figures(["yes" if yes else "no" for yes in said], asked)
    hits = sum(a and b for a, b in pairs)
    precision, recall = (hits / sum(some) if any(some) else 0.0 for some in (said, truth))
    assert figures["accuracy"].value == pytest.approx(sum(a == b for a, b in pairs) / len(pairs))
    assert figures["precision"].value == pytest.approx(precision)
    assert figures["recall"].value == pytest.approx(recall)
    assert figures["F1"].value == pytest.approx(2 * precision * recall / (precision + recall) if hits else 0.0)
    assert figures["yes ratio"].value == pytest.approx(sum(said) / len(pairs))


def test_by_kind():
    pixels = np.zeros((1, 1, 3), np.uint8)
    asked = [
        Question("1", (pixels,), answers=("yes",), kind="random"),
        Question("2", (pixels,), answers=("no",), kind="random"),
        Question("3", (pixels,), answers=("yes",), kind="popular"),
        Question("4", (pixels,), answers=("no",), kind="popular"),
    ]
    figures = yes_no.figures(["yes", "no", "yes", "yes"], asked)
    values = {name: (round(figure.value, 4), figure.count) for name, figure in figures.items()}
    assert values == {
        "accuracy": (0.75, 4),
        "precision": (0.6667, 4),
        "recall": (1.0, 4),
        "F1": (0.8, 4),
        "yes ratio": (0.75, 4),
        "accuracy (random)": (1.0, 2),
        "precision (random)": (1.0, 2),
        "recall (random)": (1.0, 2),
        "F1 (random)": (1.0, 2),
        "yes ratio (random)": (0.5, 2),
        "accuracy (popular)": (0.5, 2),
        "precision (popular)": (0.5, 2),
        "recall (popular)": (1.0, 2),
        "F1 (popular)": (0.6667, 2),
        "yes ratio (popular)": (1.0, 2),
        "F1, mean of the kinds": (0.8333, 4),
    }
    assert figures["F1"].interval == (0.8, 0.8)  # a single image says nothing of others


def test_answers_must_be_known():
    with pytest.raises(UserError, match="question 7: its answers are not published"):
        yes_no.figures(["yes"], [Question("7")])
