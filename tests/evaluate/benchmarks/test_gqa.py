"""GQA: its files, and its scores against what eval.py computes.

The figures are those of videollava/eval/eval_gqa.py of PKU-YuanGroup/Video-LLaVA (commit 984e65bf), a copy of the
official program, run with --consistency on `drawn()`, before it rounds them to print them.
"""

import json
import random

import pytest

from emu_jax.evaluate.benchmarks.benchmark import Scoring, Weights
from emu_jax.evaluate.benchmarks.gqa import SceneQuestion
from emu_jax.evaluate.benchmarks.registry import find_benchmark
from tests.evaluate.benchmarks.editing import edit, read, refused
from tests.evaluate.people import write_json
from tests.evaluate.samples import write_sample

FILE = "testdev_balanced_questions.json"
GQA = find_benchmark("gqa")


def test_questions(tmp_path):
    write_sample("gqa", tmp_path)
    found = read("gqa", tmp_path)
    assert list(found)[:3] == ["201307000", "201307001", "201307002"]
    assert found["201307001"] == SceneQuestion(
        id="201307001",
        images=(tmp_path / "images" / "n161310.jpg",),
        text="What skin tone does the person have?",
        answers=("medium-light",),
        kind="query",
        semantic="attribute",
        balanced=True,
        group="tone",
        entailed=("201307000",),
    )
    assert found["201307000"].group == "" and found["201307000"].kind == "verify"
    everything = read("gqa", tmp_path, "testdev_all")
    assert found.items() <= everything.items()
    assert [q.balanced for q in everything.values()].count(False) == 4
    (first, *_) = read("gqa", tmp_path, "submission_all").values()
    assert first == SceneQuestion("201307000", (tmp_path / "images" / "n161310.jpg",), text="Is the skin tone light?")


def test_the_layout_of_the_archives(tmp_path):
    write_sample("gqa", tmp_path)
    for folder in ("questions", "questions1.2"):
        (tmp_path / folder).mkdir()
        path = next(tmp_path.rglob(FILE))
        path.rename(tmp_path / folder / FILE)
        assert len(read("gqa", tmp_path)) == 12


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda q: q.pop("answer"), " has no answer"),
        (lambda q: q.update(isBalanced="true"), ".isBalanced is 'true'; expected true or false"),
        (lambda q: q["types"].pop("semantic"), ".types has no semantic"),
        (lambda q: q.pop("groups"), " has no groups"),
        (lambda q: q["groups"].update({"global": 3}), ".groups.global is 3; expected a text"),
        (lambda q: q.update(entailed=[1]), ".entailed[0] is 1; expected a text"),
        (lambda q: q.update(imageId=7), ".imageId is 7; expected a text"),
    ],
)
def test_wrong_files(tmp_path, change, expected):
    write_sample("gqa", tmp_path)
    edit(tmp_path / FILE, lambda document: change(document["201307012"]))
    assert refused("gqa", tmp_path) == f"{FILE}: 201307012{expected}"


def test_an_id_that_stands_twice(tmp_path):
    write_sample("gqa", tmp_path)
    path = tmp_path / FILE
    path.write_text(path.read_text().replace('"201307012": {', '"201307011": {'))
    assert refused("gqa", tmp_path).startswith(f"{FILE}: an object has the name '201307011' twice; expected the file")


def test_an_image_that_leads_out_of_the_folder(tmp_path):
    write_sample("gqa", tmp_path)
    edit(tmp_path / FILE, lambda document: document["201307012"].update(imageId="../../a"))
    assert refused("gqa", tmp_path).startswith("ROOT: annotations name the file 'images/../../a.jpg', which leads out")


# ---------------------------------------------------------------- scores

STRUCTURAL = {"verify": ["yes", "no"], "logical": ["yes", "no"], "choose": ["left", "right"], "compare": ["cat", "dog"]}
ANSWERS = STRUCTURAL | {"query": ["red", "blue", "green", "white", "table"]}


def drawn() -> tuple[dict, dict]:
    """160 questions about 40 images in the published format, about 100 of them balanced, and a prediction for each."""
    rng = random.Random(3)
    questions, predictions = {}, {}
    for number in range(160):
        first = number - number % 4  # of the image
        structural = rng.choice(sorted(ANSWERS))
        answer = rng.choices(ANSWERS[structural], range(len(ANSWERS[structural]), 0, -1))[0]
        questions[f"{number:08d}"] = {
            "semantic": [{"operation": "select", "argument": "cat (1)", "dependencies": []}],
            "entailed": [f"{key:08d}" for key in rng.sample(range(first, first + 4), rng.randint(0, 3))],
            "question": "Which colour has it?",
            "imageId": f"n{first}",
            "isBalanced": rng.random() < 0.65,
            "groups": {"global": rng.choice([None, "colour", "side", "thing"]), "local": None},
            "answer": answer,
            "types": {"structural": structural, "semantic": rng.choice(["attr", "cat", "global", "obj", "rel"])},
        }
        wrong = [rng.choice(ANSWERS[structural]), answer.capitalize(), answer + ".", " " + answer, "the " + answer, ""]
        predictions[f"{number:08d}"] = answer if rng.random() < 0.6 else rng.choice(wrong)
    return questions, predictions


OFFICIAL = {
    "accuracy": 64.15094339622641,
    "accuracy (binary)": 65.0,
    "accuracy (open)": 61.53846153846154,
    "accuracy (choose)": 66.66666666666666,
    "accuracy (compare)": 62.5,
    "accuracy (logical)": 61.111111111111114,
    "accuracy (query)": 61.53846153846154,
    "accuracy (verify)": 70.58823529411765,
    "accuracy (attribute)": 60.0,
    "accuracy (category)": 81.81818181818183,
    "accuracy (scene)": 54.54545454545454,
    "accuracy (object)": 68.42105263157895,
    "accuracy (relation)": 55.55555555555556,
    "consistency": 70.15503875968992,
    "distribution": 0.04538095238095238,
}


def figures(root, questions, predictions, split="val_all"):
    write_json(root / f"{split}_questions.json", questions)
    (root / "images").mkdir(exist_ok=True)
    for entry in questions.values():
        (root / "images" / f"{entry['imageId']}.jpg").touch()
    return GQA.score(GQA.read(root, split), predictions, Scoring(root, root, Weights(), emu=None))


def test_scores_are_the_official_ones(tmp_path):
    found = figures(tmp_path, *drawn())
    values = {name: (figure.value if name == "distribution" else 100 * figure.value) for name, figure in found.items()}
    for name, expected in OFFICIAL.items():
        print(f"{name:28s} {values[name]:9.5f}, eval.py: {expected:9.5f}")
    assert values == pytest.approx(OFFICIAL, rel=1e-12)
    for figure in found.values():
        assert figure.interval[0] < figure.value < figure.interval[1]


def test_consistency_needs_every_entailed_question(tmp_path):
    """With the balanced questions alone the others are missing."""
    questions, predictions = drawn()
    balanced = {key: entry for key, entry in questions.items() if entry["isBalanced"]}
    found = figures(tmp_path, balanced, predictions)
    everything = figures(tmp_path, questions, predictions)
    assert found == {name: figure for name, figure in everything.items() if name != "consistency"}


def test_a_question_entails_itself_for_nothing(tmp_path):
    questions, predictions = drawn()
    for key, entry in questions.items():
        entry["entailed"] = [key]
    assert "consistency" not in figures(tmp_path, questions, predictions)


def test_nothing_is_scored_without_balanced_questions(tmp_path):
    questions, predictions = drawn()
    for entry in questions.values():
        entry["isBalanced"] = False
    assert figures(tmp_path, questions, predictions) == {}


def test_distribution_by_hand(tmp_path):
    """Right 3 red, 1 blue; given 2 red, 2 blue: 1/3 + 1/1. Given "pink" instead of a blue one: 1/3 + 0."""
    questions, _ = drawn()
    four = {key: questions[key] for key in list(questions)[:4]}
    for entry, answer in zip(four.values(), ["red", "red", "red", "blue"], strict=True):
        entry |= {"answer": answer, "isBalanced": True, "groups": {"global": "colour", "local": None}, "entailed": []}
    for given, expected in ((["red", "red", "blue", "blue"], 4 / 3), (["red", "red", "blue", "pink"], 1 / 3)):
        found = figures(tmp_path, four, dict(zip(four, given, strict=True)))
        assert found["distribution"].value == pytest.approx(expected / 100)


def test_submission(tmp_path):
    write_sample("gqa", tmp_path)
    asked = GQA.read(tmp_path, "submission_all")
    GQA.write_submission(tmp_path / "out.json", asked, {question.id: "yes" for question in asked})
    assert json.loads((tmp_path / "out.json").read_text())[0] == {"questionId": "201307000", "prediction": "yes"}
