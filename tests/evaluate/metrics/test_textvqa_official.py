"""TextVQA accuracies of 120 drawn answers, against what the official program computes for them.

The figures are those of `TextVQAAccuracyEvaluator` in mmf/utils/m4c_evaluators.py of facebookresearch/mmf (commit
b0ffc7fb), in tenths, run on `cases()`. LLaVA's copy computes the same.
"""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emu_jax.evaluate.metrics import vqa

# fmt: off
WORDS = (
    "lay's", "lays", "Lay's", "macy's", "macy", "1,000", "1000", "1 000", "3.50", "$3.50", "3", "three", "None", "zero",
    "dr. pepper", "dr pepper", "dont", "don't", "Im", "i'm", "she's", "shes", "the", "a", "STOP", "stop", "stop!",
    "coca-cola", "coca cola", "cocacola", "what?", "what ?", "ten\tdown", "u.s.a.", "usa", "10:30", "a/b", "a / b", "é",
    "let's", "o'clock", "oclock", "yall'd've", "[x]", "(left)", "b,c", "b, c", "rock & roll", "#1", "№ 5", "100%",
)
# fmt: on


def cases() -> list[tuple[str, list[str]]]:
    """Predictions of one to three words, and ten answers of which some agree with them in one way or another."""
    rng = random.Random(1)
    found = []
    for _ in range(120):
        words = [" ".join(rng.choices(WORDS, k=rng.choice([1, 1, 1, 2, 3]))) for _ in range(3)]
        first = words[0]
        alike = [first, first.upper(), first + ".", first + "\n", first.replace("'", ""), first + ", ", "the " + first]
        others = [*words[1:], "no", "?", first + "s", first.replace(" ", ""), first[1:], *rng.sample(WORDS, 4)]
        answers = rng.choices([*rng.sample(alike, 2), *others], k=10)
        found.append((rng.choice(alike), [rng.choice(answers) for _ in range(10)]))
    return found


# One character an answer, T for 10.
OFFICIAL = (
    "90333T3TT66T939966T69969063900039039TTT69T03396090090T00T306"
    "T9T6000T03060060T60TTT0396T330T9903633T39096T3TT3T060T30336T"
)


def test_drawn_answers_score_as_the_official_program_says():
    found = [10 * vqa.textvqa_accuracy(prediction, answers) for prediction, answers in cases()]
    expected = [10 if mark == "T" else int(mark) for mark in OFFICIAL]
    differing = [(case, a, b) for case, a, b in zip(cases(), found, expected, strict=True) if round(a, 9) != b]
    print(f"{len(found)} answers, mean {sum(found) / len(found):.3f}, expected {sum(expected) / len(expected):.3f}")
    assert not differing, differing[:3]


# (text, what `EvalAIAnswerProcessor` makes of it)
NORMAL_FORMS = [
    ("Lay's chips, 3.50?", "lay 's chips 3.50"),
    ("The U.S.A., dont!", "usa don't"),
    ("x-ray", "x ray"),
    ("Ten, eleven", "10 eleven"),
    ("1,000", "1000"),
    ("b , c", "b c"),
    ("couldnt've's", "couldn't've 's"),
    ("She's Im", "she 's im"),
    ("a\tb\nc", "b c"),
    ("it's 'twas 10.30.", "it 's 'twas 10.30"),
    ("Dr. Pepper's", "dr pepper 's"),
    ("None.", "0"),
    ("the", ""),
]


@pytest.mark.parametrize(("text", "expected"), NORMAL_FORMS)
def test_normal_form_is_the_official_one(text, expected):
    assert vqa._textvqa_normal(text) == expected


@given(st.text("aAn the.,'s!?-/019\n\t", max_size=12), st.text("aAn the.,'s!?-/019\n\t", max_size=12))
def test_one_of_ten_answers_counts_three_tenths(prediction, other):
    """Whether two texts are one answer does not depend on which of them is predicted."""
    alike = vqa.textvqa_accuracy(prediction, [other] * 10)
    assert alike in (0.0, 1.0) and alike == vqa.textvqa_accuracy(other, [prediction] * 10)
    one = vqa.textvqa_accuracy(prediction, [other] + ["something else"] * 9)
    assert one == pytest.approx(0.3 * alike)
