"""VQA accuracy: expected values are what the official program printed (GT-Vision-Lab/VQA); VizWiz's are by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emu_jax.errors import UserError
from emu_jax.evaluate.benchmarks import vizwiz
from emu_jax.evaluate.metrics import vqa
from emu_jax.evaluate.question import Question

# (text, what vqaEval.py's processPunctuation and processDigitArticle make of it)
OFFICIAL_NORMAL_FORMS = [
    ("A Dog.", "dog"),
    ("the two dogs", "2 dogs"),
    ("None", "0"),
    ("dont know", "don't know"),
    ("couldnt've", "couldn't've"),
    ("yall'll", "y'all'll"),
    ("it's", "it's"),
    ("U.S.A.", "usa"),
    ("3.5 feet", "3.5 feet"),
    ("1,000, or so", "1000 or so"),
    ("red/blue", "red blue"),
    ("red / blue", "red blue"),
    ("x-ray", "x ray"),
    ("yes!", "yes"),
    ("Is it? no", "is it no"),
    ("twas", "'twas"),
    ("somebody'd", "somebodyd"),
    ("shes", "shes"),
    ("Im", "im"),
    ("ten\tcats\n", "10 cats"),
    ("(left)", "left"),
    ("a", ""),
    ("[ok] {fine}", "ok fine"),
    ("half-past 10.30.", "half past 10.30"),
    ("rock & roll", "rock & roll"),
    ("a@b.c", "bc"),
    ("5 ,6", "5 6"),
]
# (prediction, answers, what vqaEval.py scores in percent)
OFFICIAL_ACCURACY = [
    ("yes", ["yes"] * 10, 100.0),
    ("Yes", ["yes"] * 10, 0.0),
    ("yes.", ["yes"] * 10, 0.0),
    ("Yes.", ["yes"] * 9 + ["no"] * 1, 100.0),
    ("2", ["two"] * 4 + ["2"] * 3 + ["three"] * 3, 100.0),
    ("dog", ["dog"] * 1 + ["cat"] * 9, 30.0),
    ("dog", ["dog"] * 2 + ["cat"] * 8, 60.0),
    ("dog", ["dog"] * 3 + ["cat"] * 7, 90.0),
    ("the dog", ["dog"] * 4 + ["cat"] * 6, 100.0),
    ("dont know", ["don't know"] * 5 + ["a"] * 5, 100.0),
    ("", ["a", "the"] * 5, 100.0),
    ("x-ray", ["x ray"] * 3 + ["xray"] * 7, 90.0),
    ("  red \n", ["red"] * 10, 100.0),
]


@pytest.mark.parametrize(("text", "expected"), OFFICIAL_NORMAL_FORMS)
def test_normal_form_is_the_official_one(text, expected):
    assert vqa.normalise(text) == expected


def test_no_more_than_32_periods_vanish():
    """The official code passes re.UNICODE, which is 32, where a count belongs."""
    assert vqa.normalise("a" + "." * 40 + "b") == "a" + "." * 8 + "b"


@pytest.mark.parametrize(("prediction", "answers", "expected"), OFFICIAL_ACCURACY)
def test_accuracy_is_the_official_one(prediction, answers, expected):
    assert 100 * vqa.accuracy(prediction, answers) == pytest.approx(expected, abs=1e-9)


@given(
    st.text("aAn the.,'!?-/0123456789\n", max_size=20), st.lists(st.sampled_from(["a", "no", "2", "1,000"]), min_size=1)
)
def test_accuracy_is_a_share_whatever_is_written(prediction, answers):
    assert 0.0 <= vqa.accuracy(prediction, answers) <= 1.0


@given(st.lists(st.sampled_from(["dog", "cat", "bird"]), min_size=1, max_size=12), st.sampled_from(["dog", "fish"]))
def test_agreement_leaves_every_person_out_in_turn(answers, answer):
    """The closed form against the definition."""
    rest = [answers[:place] + answers[place + 1 :] for place in range(len(answers))]
    expected = np.mean([min(1.0, others.count(answer) / 3) for others in rest])
    assert vqa.agreement(answer, answers) == pytest.approx(expected)


def test_vizwiz_normalises_the_prediction_only():
    answers = ["don't know"] * 4 + ["Two dogs"] * 3 + ["2 dogs"] * 3
    assert vizwiz.accuracy("Don't know.", answers) == 1.0
    assert vizwiz.accuracy("the two dogs", answers) == pytest.approx(0.9)  # "2 dogs"
    assert vizwiz.accuracy("Two dogs", ["Two dogs"] * 10) == 0.0
    # Its table writes typographic apostrophes, for all but a few words.
    assert vqa.normalise("dont", vizwiz.CONTRACTIONS) == "don’t"
    assert vqa.normalise("cant", vizwiz.CONTRACTIONS) == "can't"
    assert vqa.normalise("couldn'tve", vizwiz.CONTRACTIONS) == "couldn’t’ve"


def test_figures_by_type():
    questions = [
        Question("1", answers=("yes",) * 10, kind="yes/no"),
        Question("2", answers=("red",) + ("blue",) * 9, kind="other"),
        Question("3", answers=("red",) * 2 + ("blue",) * 8, kind="other"),
    ]
    figures = vqa.figures(["yes", "red", "Red"], questions)
    values = {name: (round(figure.value, 6), figure.count) for name, figure in figures.items()}
    assert values == {"accuracy": (0.633333, 3), "accuracy (other)": (0.45, 2), "accuracy (yes/no)": (1.0, 1)}
    low, high = figures["accuracy"].interval
    assert 0.3 <= low < 0.633333 < high <= 1.0


@pytest.mark.parametrize(
    ("predictions", "questions", "words"),
    [
        (["a"], [], "1 predictions for 0 questions"),
        ([], [], "no predictions"),
        (["a", "b"], [Question("q1", answers=("a",)), Question("q2")], "question q2: its answers are not published"),
    ],
)
def test_errors_are_one_line(predictions, questions, words):
    with pytest.raises(UserError, match=words) as error:
        vqa.figures(predictions, questions)
    assert "\n" not in str(error.value)


def test_answerability_has_scikit_learns_scores():
    """Expected: average_precision_score 0.7708333, f1_score 0.75 of scikit-learn for the same eight questions."""
    unanswerable = np.array([1, 0, 1, 1, 0, 0, 1, 0], bool)
    scores = np.array([0.9, 0.8, 0.8, 0.4, 0.4, 0.3, 0.6, 0.1])
    figures = vizwiz.answerability(1 - scores, ~unanswerable)
    assert figures["answerability: average precision"].value == pytest.approx(0.7708333333333333)
    assert figures["answerability: F1"].value == pytest.approx(0.75)
    for figure in figures.values():
        assert figure.interval[0] < figure.value < figure.interval[1] <= 1.0 and figure.count == 8


def test_answerability_needs_unanswerable_questions():
    with pytest.raises(UserError, match="none of the questions is unanswerable"):
        vizwiz.answerability([0.2, 0.7], [True, True])
    with pytest.raises(UserError, match="1 predictions for 2 questions"):
        vizwiz.answerability([0.2], [True, False])
