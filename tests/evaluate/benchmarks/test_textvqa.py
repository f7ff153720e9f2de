"""TextVQA."""

import pytest

from emu_jax.evaluate.benchmarks.benchmark import Scoring, Weights
from emu_jax.evaluate.benchmarks.registry import find_benchmark
from emu_jax.evaluate.question import Question
from tests.evaluate.benchmarks.editing import edit, read, refused
from tests.evaluate.samples import write_sample

FILE = "TextVQA_0.5.1_val.json"


@pytest.fixture
def textvqa(tmp_path):
    write_sample("textvqa", tmp_path)
    return tmp_path


def test_questions(textvqa):
    found = read("textvqa", textvqa)
    assert list(found) == ["34602", "34603", "34604", "34605"]
    assert found["34603"] == Question(
        id="34603",
        images=(textvqa / "train_images" / "va00000000000001.jpg",),
        text="what is written here?",
        answers=("nothing",) * 7 + ("Lay's", "lays", "answering does not require reading text"),
    )
    test = read("textvqa", textvqa, "test")["39602"]
    assert test.images == (textvqa / "test_images" / "te00000000000000.jpg",) and test.answers == ()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda d: d[2].update(answers=["a"] * 9), "data[2].answers is a list of 9; expected 10 answers"),
        (lambda d: d[2].pop("answers"), "data[2] has no answers"),
        (lambda d: d[2].update(image_id=3), "data[2].image_id is 3; expected a text"),
        (
            lambda d: d.append(d[1]),
            "data[4] has the question_id 34603 again, after data[1]; expected each once",
        ),
    ],
)
def test_wrong_files(textvqa, change, expected):
    edit(textvqa / FILE, lambda document: change(document["data"]))
    assert refused("textvqa", textvqa) == f"{FILE}: {expected}"


def test_an_image_that_leads_out_of_the_folder(textvqa):
    edit(textvqa / FILE, lambda d: d["data"][0].update(image_id="../../a"))
    expected = "ROOT: annotations name the file 'train_images/../../a.jpg', which leads out of the folder"
    assert refused("textvqa", textvqa) == expected


def test_scores(textvqa):
    """Of ten answers seven, one, one and none agree; another tenth of "lay's" is not "lays"."""
    benchmark = find_benchmark("textvqa")
    questions = benchmark.read(textvqa)
    said = dict(zip([question.id for question in questions], ["Nothing.", "lay's", "LAYS,", "a sign"], strict=True))
    figures = benchmark.score(questions, said, Scoring(textvqa, textvqa, Weights(), emu=None))
    assert list(figures) == ["accuracy"] and figures["accuracy"].value == pytest.approx((1 + 0.3 + 0.3 + 0) / 4)
    test = benchmark.read(textvqa, "test")
    assert benchmark.score(test, {q.id: "a" for q in test}, Scoring(textvqa, textvqa, Weights(), emu=None)) == {}
