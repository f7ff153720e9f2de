"""Ranks and VisDial's scores, against worked examples and the reference implementation's own ranking."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emu_jax.errors import UserError
from emu_jax.evaluate.metrics import ranking
from emu_jax.evaluate.question import Question
from tests.generate.test_golden import PLACEHOLDER, as_prompt, case  # noqa: F401  (a fixture)

CANDIDATES = ("yes", "no", "two", "a dog")


def test_ranks_are_the_references(case):  # noqa: F811
    model, reference, _, images = case
    expected = reference["candidates"]
    prompt = as_prompt(expected["prompt"], PLACEHOLDER, images, iter(expected["image_indices"]))
    ranks = ranking.ranks(model.score_candidates(prompt, expected["candidates"]))
    by_rank = np.argsort(ranks).tolist()
    assert by_rank == expected["rank"], f"best first: {by_rank}, expected {expected['rank']}"


def test_lowest_score_ranks_first_and_equals_keep_their_order():
    assert ranking.ranks(np.array([3.0, 1.0, 2.0, 1.0])).tolist() == [4, 1, 3, 2]


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30))
def test_ranks_order_the_scores(scores):
    ranks = ranking.ranks(np.array(scores))
    assert sorted(ranks) == list(range(1, len(scores) + 1))
    assert [scores[place] for place in np.argsort(ranks)] == sorted(scores)


def test_ndcg_by_hand():
    # Two candidates are relevant, so the first two ranks count: the first holds 0.5, the second nothing.
    # Ideal: 1.0 at the first, 0.5 at the second.
    ideal = 1.0 / math.log2(2) + 0.5 / math.log2(3)
    assert ranking.ndcg(np.array([3, 2, 1, 4]), [1.0, 0.0, 0.5, 0.0]) == pytest.approx(0.5 / ideal)
    assert ranking.ndcg(np.array([1, 3, 2, 4]), [1.0, 0.0, 0.5, 0.0]) == pytest.approx(1.0)
    assert ranking.ndcg(np.array([4, 1, 3, 2]), [1.0, 0.0, 0.5, 0.0]) == 0.0


def test_figures_are_the_challenges():
    """120 questions of 100 drawn scores; expected is what the starter code's visdialch/metrics.py gives."""
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(120, 100)).astype(np.float32)
    truth = rng.integers(0, 100, 120)
    relevance = np.where(rng.random((120, 100)) < 0.05, rng.integers(1, 6, (120, 100)) / 5, 0.0).astype(np.float32)
    relevance[np.arange(120), truth] = 1.0
    names = tuple(map(str, range(100)))
    questions = [
        Question(str(n), candidates=names, answers=(str(truth[n]),), relevance=tuple(relevance[n].tolist()))
        for n in range(120)
    ]
    found = {name: figure.value for name, figure in ranking.figures([*scores], questions).items()}
    expected = {"R@1": 1 / 120, "R@5": 7 / 120, "R@10": 9 / 120, "mean rank": 53.61666488647461}
    expected |= {"MRR": 0.05098142474889755, "NDCG": 0.042621757835149765}
    assert found == pytest.approx(expected, rel=1e-6)


def test_figures_by_hand():
    questions = [
        Question("1", candidates=CANDIDATES, answers=("no",), relevance=(0.0, 1.0, 0.0, 0.0)),
        Question("2", candidates=CANDIDATES, answers=("a dog",), relevance=(0.0, 0.0, 0.5, 1.0)),
        Question("3", candidates=CANDIDATES, answers=("yes",)),
        Question("4", candidates=CANDIDATES, answers=("yes",), relevance=(0.0, 0.0, 0.0, 0.0)),
    ]
    scores = [np.array(row) for row in ([2.0, 1.0, 3.0, 4.0], [1.0, 2.0, 0.5, 3.0], [0.1, 1, 1, 1], [0.1, 1, 1, 1])]
    figures = ranking.figures(scores, questions)  # ranks of the answers: 1, 4, 1, 1
    ndcg = (1.0 + 0.5 / (1.0 + 0.5 / math.log2(3))) / 2
    expected = {"R@1": 0.75, "R@5": 1.0, "R@10": 1.0, "mean rank": 1.75, "MRR": 3.25 / 4, "NDCG": ndcg}
    assert {name: figure.value for name, figure in figures.items()} == pytest.approx(expected)
    chance = {"R@1": 0.25, "R@5": 1.0, "R@10": 1.0, "mean rank": 2.5, "MRR": (1 + 1 / 2 + 1 / 3 + 1 / 4) / 4}
    assert {name: figure.chance for name, figure in figures.items()} == pytest.approx(chance | {"NDCG": None})
    scales = {name: figure.paper_scale for name, figure in figures.items()}
    assert scales == {**dict.fromkeys(scales, 100.0), "mean rank": 1.0}  # papers print a mean rank as it is
    assert [figures["R@1"].count, figures["NDCG"].count] == [4, 2]  # where something is relevant


@pytest.mark.parametrize(
    ("scores", "fields", "words"),
    [
        ([1.0, 2.0], {}, "question 7: 2 scores for 4 candidates"),
        ([1.0, 2.0, math.nan, 0.0], {}, "candidate 2 has score nan"),
        ([1.0, 2.0, 3.0, 0.0], {"relevance": (1.0,)}, "relevance of 1 of 4 candidates"),
        ([1.0, 2.0, 3.0, 0.0], {"answers": ("cat",)}, "its answer 'cat' is not among its candidates"),
    ],
)
def test_errors_name_the_question(scores, fields, words):
    question = Question("7", **({"candidates": CANDIDATES, "answers": ("no",)} | fields))
    with pytest.raises(UserError, match=words):
        ranking.figures([np.array(scores)], [question])
