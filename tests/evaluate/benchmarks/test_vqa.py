"""VQAv2, OK-VQA and VizWiz."""

import pytest

from emu_jax.evaluate.benchmarks.benchmark import Scoring, Weights
from emu_jax.evaluate.benchmarks.registry import find_benchmark
from emu_jax.evaluate.question import Question
from tests.evaluate.benchmarks.editing import edit, read, refused
from tests.evaluate.samples import write_sample

ASKED = "v2_OpenEnded_mscoco_val2014_questions.json"
ANSWERED = "v2_mscoco_val2014_annotations.json"


@pytest.fixture
def vqav2(tmp_path):
    write_sample("vqav2", tmp_path)
    return tmp_path


def test_vqav2(vqav2):
    found = read("vqav2", vqav2)
    image = vqav2 / "val2014" / "COCO_val2014_000000000073.jpg"
    three = [
        ("73000", "What skin tone does the person have?", ("medium",) * 8 + ("brown",) * 2, "other"),
        ("73001", "Is this a person in lotus position?", ("yes",) * 10, "yes/no"),
        ("73002", "How many people are there?", ("1",) * 9 + ("one",), "number"),
    ]
    assert [found[key] for key, *_ in three] == [
        Question(id=key, images=(image,), text=text, answers=answers, kind=kind) for key, text, answers, kind in three
    ]
    assert found["73000"].images[0] is found["73002"].images[0]  # one path an image, however many questions


def test_splits_without_answers(vqav2):
    for split in ("test", "test-dev"):
        first, second = read("vqav2", vqav2, split).values()
        assert first == Question(
            id="1000",
            images=(vqav2 / "test2015" / "COCO_test2015_000000000001.jpg",),
            text="What skin tone does the person have?",
        )
        assert second.id == "14000"


def test_the_layout_of_the_official_code(vqav2):
    for name, folder in ((ASKED, "Questions"), (ANSWERED, "Annotations"), ("val2014", "images")):
        (vqav2 / folder).mkdir()
        (vqav2 / name).rename(vqav2 / folder / name)
    assert len(read("vqav2", vqav2)) == 12


@pytest.mark.parametrize(
    ("file", "change", "expected"),
    [
        (
            ASKED,
            lambda d: d["questions"][4].update(question_id=42000),
            f"{ASKED}: questions[4] has the question_id 42000 again, after questions[0]; expected each once",
        ),
        (
            ANSWERED,
            lambda d: d["annotations"].append(d["annotations"][1]),
            f"{ANSWERED}: annotations[12] has the question_id 42001 again, after annotations[1]; expected each once",
        ),
        (
            ANSWERED,
            lambda d: d.update(annotations=d["annotations"][2:]),
            f"{ANSWERED}: has no question 42000 (and 1 more), which {ASKED} has; "
            "expected two complete files of one release and split",
        ),
        (
            ASKED,
            lambda d: d["questions"].pop(3),
            f"{ANSWERED}: has question 73000, which {ASKED} lacks; "
            "expected two complete files of one release and split",
        ),
        (
            ANSWERED,
            lambda d: d["annotations"][3].update(image_id=74),
            f"{ANSWERED}: annotations[3].image_id is 74; expected 73, as {ASKED} has it for question 73000",
        ),
        (
            ANSWERED,
            lambda d: d["annotations"][3].update(answers=[]),
            f"{ANSWERED}: annotations[3].answers is a list of 0; expected at least one answer",
        ),
        (
            ANSWERED,
            lambda d: d["annotations"][3]["answers"][9].update(answer=7),
            f"{ANSWERED}: annotations[3].answers[9].answer is 7; expected a text",
        ),
        (ASKED, lambda d: d["questions"][0].pop("question"), f"{ASKED}: questions[0] has no question"),
    ],
)
def test_wrong_files(vqav2, file, change, expected):
    edit(vqav2 / file, change)
    assert refused("vqav2", vqav2) == expected


def test_vqav2_is_scored_by_two_rules(vqav2):
    """Where all people agree, the official rule wants the prediction to the letter; the reference's normalises it."""
    benchmark = find_benchmark("vqav2")
    questions = benchmark.read(vqav2)[:3]
    said = {"42000": "medium-light", "42001": "Yes.", "42002": "1"}
    figures = benchmark.score(questions, said, Scoring(vqav2, vqav2, Weights(), emu=None))
    assert {name: figure.value for name, figure in figures.items()} == {
        "accuracy": pytest.approx(2 / 3),
        "accuracy (number)": 1.0,
        "accuracy (other)": 1.0,
        "accuracy (yes/no)": 0.0,
        "accuracy by the reference's rule": 1.0,
        "accuracy by the reference's rule (number)": 1.0,
        "accuracy by the reference's rule (other)": 1.0,
        "accuracy by the reference's rule (yes/no)": 1.0,
    }


def test_okvqa(tmp_path):
    write_sample("okvqa", tmp_path)
    assert read("okvqa", tmp_path)["133000"] == Question(
        id="133000",
        images=(tmp_path / "val2014" / "COCO_val2014_000000000133.jpg",),
        text="What is a person like this called?",
        answers=("woman with white cane",) * 8 + ("person",) * 2,
        kind="four",
    )


def test_vqav2_files_for_okvqa(vqav2):
    assert refused("okvqa", vqav2).startswith("ROOT: no OpenEnded_mscoco_val2014_questions.json; okvqa expects there: ")


def test_vizwiz(tmp_path):
    write_sample("vizwiz", tmp_path)
    found = read("vizwiz", tmp_path)
    name = "VizWiz_val_00000003.jpg"
    assert found[name] == Question(
        id=name,
        images=(tmp_path / "val" / name,),
        text="What does the label say?",
        answers=("unanswerable",) * 9 + ("no label",),
        kind="unanswerable",
    )
    assert [question.kind for question in found.values()] == ["other"] * 3 + ["unanswerable"]
    name = "VizWiz_test_00000003.jpg"
    test = read("vizwiz", tmp_path, "test")
    assert test[name] == Question(id=name, images=(tmp_path / "test" / name,), text="What does the label say?")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            lambda d: d.append(d[1]),
            "[4] has the image 'VizWiz_val_00000001.jpg' again, after [1]; expected each once",
        ),
        (lambda d: d[2].pop("answers"), "[2] has no answers"),
        (lambda d: d[2].update(answers=[]), "[2].answers is a list of 0; expected at least one answer"),
    ],
)
def test_wrong_vizwiz(tmp_path, change, expected):
    write_sample("vizwiz", tmp_path)
    edit(tmp_path / "Annotations" / "val.json", change)
    assert refused("vizwiz", tmp_path) == f"Annotations/val.json: {expected}"
