"""VQA accuracies of 120 drawn answers, against what the official programs print for them.

The figures are those of `OKVQAEval` and of `VQAEval` in the reference's Emu1/mm_eval/datasets/vqa_tools/vqa_eval.py
(Salesforce's copy of the VQA API, with NLTK's Porter stemmer), in percent, run on `cases()`.
"""

import random

import pytest

from emu_jax.evaluate.metrics import vqa

# fmt: off
WORDS = (
    "surfing", "surf", "bananas", "banana", "dogs", "dog", "ponies", "pony", "skateboarding", "skateboard", "two", "2",
    "running", "run", "the.house", "house's", "T-shirt", "t-shirts", "glasses", "glass", "wine-glass", "1,000", "10.30",
    "don't", "dont", "trains", "training", "red", "Red", "RED/blue", "stop_sign", "U.S.A.", "fire", "hydrant", "an",
    "apple", "happily", "happy", "electricity", "electric", "none", "zero",
)
# fmt: on


def cases() -> list[tuple[str, list[str]]]:
    """Predictions of one to three words, and ten answers of which some agree with them in one way or another."""
    rng = random.Random(0)
    found = []
    for _ in range(120):
        words = [" ".join(rng.choices(WORDS, k=rng.choice([1, 1, 1, 2, 3]))) for _ in range(3)]
        alike = {words[0], words[0].lower(), words[0].rstrip("s"), words[0] + "s", words[0] + ".", words[0] + "\n"}
        answers = rng.choices([*sorted(alike), *words[1:]], k=rng.choice([1, 2, 3]))
        found.append((rng.choice(sorted(alike)), [rng.choice(answers) for _ in range(10)]))
    return found


def percent(coded: str) -> list[float]:
    """One character a figure: tenths of it in percent, T for 100."""
    return [100.0 if mark == "T" else 10.0 * int(mark) for mark in coded]


OKVQA = percent(
    "0TT0T0TT0T0T0T00TT3000T0000TTTT0TT006TT0009TT0T000T00T0T0960"
    "000T000T0T09T00T00000T9T00T00TTT9TTT009T90T00T000000T0000000"
)
PLAIN = percent(
    "0T00T00009000TT0T0300090000TT0T0TTT00TT0T00000T000T0090T0000"
    "000T0000T00900000000099000T00TTT9TTT009000000000000000000000"
)

# The six cases of which OK-VQA's stems decide: prediction, answers, what `OKVQAEval` gives in percent.
STEMS = [
    ("surfing", ["surf"] * 8 + ["wave ride"] * 2, 100.0),
    ("bananas", ["banana"] * 6 + ["fruit"] * 4, 100.0),
    ("skateboarding", ["skateboard"] * 10, 100.0),
    ("dogs", ["dog"] * 4 + ["puppy"] * 6, 100.0),
    ("ponies", ["pony"] * 6 + ["horse"] * 4, 100.0),
    ("2", ["two"] * 6 + ["three"] * 4, 0.0),
]


@pytest.mark.parametrize(
    ("rule", "expected"), [(vqa.okvqa_accuracy, OKVQA), (vqa.reference_accuracy, PLAIN)], ids=["OKVQAEval", "VQAEval"]
)
def test_drawn_answers_score_as_the_references_programs_say(rule, expected):
    found = [round(100 * rule(prediction, answers), 2) for prediction, answers in cases()]
    differing = [(case, a, b) for case, a, b in zip(cases(), found, expected, strict=True) if a != b]
    print(f"{len(found)} answers, mean {sum(found) / len(found):.2f}, expected {sum(expected) / len(expected):.2f}")
    assert not differing, differing[:3]


@pytest.mark.parametrize(("prediction", "answers", "expected"), STEMS)
def test_stems(prediction, answers, expected):
    assert 100 * vqa.okvqa_accuracy(prediction, answers) == expected
