"""Submissions: of the right questions only, whole or not at all."""

import json

import numpy as np
import pytest

from emu_jax.errors import UserError
from emu_jax.evaluate.benchmarks.registry import benchmark_names, find_benchmark
from tests.evaluate.samples import write_sample

WRITTEN = [name for name in benchmark_names() if find_benchmark(name).submission]


def _refused(name, root, predictions, out="out.json") -> str:
    benchmark = find_benchmark(name)
    with pytest.raises(UserError) as caught:
        benchmark.write_submission(root / out, benchmark.read(root), predictions)
    assert "\n" not in str(caught.value) and not list(root.glob("out*.partial")) and not (root / "out.json").exists()
    return str(caught.value)


def test_which_have_a_format():
    names = ["coco", "gqa", "mmmu", "mmvet", "nextqa", "nocaps", "okvqa", "seedbench", "textvqa", "visdial", "vizwiz"]
    assert sorted(WRITTEN) == [*names, "vqav2"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("coco", [{"image_id": 42, "caption": "a 0"}, {"image_id": 73, "caption": "a 1"}]),
        ("nocaps", [{"image_id": 0, "caption": "a 0"}, {"image_id": 1, "caption": "a 1"}]),
        ("vqav2", [{"question_id": 42000, "answer": "a 0"}, {"question_id": 42001, "answer": "a 1"}]),
        ("okvqa", [{"question_id": 42000, "answer": "a 0"}, {"question_id": 73000, "answer": "a 1"}]),
        (
            "vizwiz",
            [
                {"image": "VizWiz_val_00000000.jpg", "answer": "a 0"},
                {"image": "VizWiz_val_00000001.jpg", "answer": "a 1"},
            ],
        ),
        ("nextqa", {"4924794333": {"0": "a 0", "1": "a 1"}}),
        ("mmvet", {"v1_0": "a 0", "v1_1": "a 1"}),
        (
            "gqa",
            [
                {"questionId": "201307000", "prediction": "a 0"},
                {"questionId": "201307001", "prediction": "a 1"},
            ],
        ),
        ("textvqa", [{"question_id": 34602, "answer": "a 0"}, {"question_id": 34603, "answer": "a 1"}]),
    ],
)
def test_formats(tmp_path, name, expected):
    write_sample(name, tmp_path)
    benchmark = find_benchmark(name)
    questions = benchmark.read(tmp_path)[:2]
    predictions = {question.id: f"a {n}" for n, question in reversed(list(enumerate(questions)))}
    benchmark.write_submission(tmp_path / "new" / "out.json", questions, predictions)
    assert json.loads((tmp_path / "new" / "out.json").read_text()) == expected
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out.json"]


def test_ranks(tmp_path):
    write_sample("visdial", tmp_path)
    questions = find_benchmark("visdial").read(tmp_path)[:2]
    ranks = [3, 1, 2, 10, 9, 8, 7, 6, 5, 4]
    predictions = {questions[0].id: ranks, questions[1].id: np.array(ranks)}
    find_benchmark("visdial").write_submission(tmp_path / "out.json", questions, predictions)
    assert json.loads((tmp_path / "out.json").read_text()) == [
        {"image_id": 185565, "round_id": 1, "ranks": ranks},
        {"image_id": 185565, "round_id": 2, "ranks": ranks},
    ]


@pytest.mark.parametrize(
    "prediction", ["yes", [1, 2, 3], list(range(10)), [1] * 10, [0.1 * n for n in range(10)], ["a"] * 10, 3, None]
)
def test_what_is_no_ranking(tmp_path, prediction):
    write_sample("visdial", tmp_path)
    good = {question.id: list(range(1, 11)) for question in find_benchmark("visdial").read(tmp_path)}
    assert _refused("visdial", tmp_path, good | {"284024/3": prediction}) == (
        f"visdial: the prediction of '284024/3' is {ascii(prediction)[:60]}; "
        "expected the ranks of its 10 candidates, 1 to 10, each once"
    )


def test_a_prediction_that_is_no_text(tmp_path):
    write_sample("mmvet", tmp_path)
    predictions = {f"v1_{n}": "a" for n in range(4)} | {"v1_2": None}
    assert _refused("mmvet", tmp_path, predictions) == "mmvet: the prediction of 'v1_2' is None; expected a text"


@pytest.mark.parametrize("name", WRITTEN)
def test_predictions_of_another_benchmark(tmp_path, name):
    write_sample(name, tmp_path)
    questions = find_benchmark(name).read(tmp_path)
    predictions = {question.id: "a" for question in questions} | {"other 1": "b", "other 2": "b"}
    assert _refused(name, tmp_path, predictions) == (
        f"{name}: 2 of {len(questions) + 2} predictions answer none of its {len(questions)} questions (the first: "
        f"'other 1'; questions are called {questions[0].id!r} and so on); are they of another benchmark or split?"
    )


@pytest.mark.parametrize("name", WRITTEN)
def test_predictions_that_miss_questions(tmp_path, name):
    write_sample(name, tmp_path)
    questions = find_benchmark(name).read(tmp_path)
    predictions = {question.id: "a" for question in questions[:-2]}
    assert _refused(name, tmp_path, predictions) == (
        f"{name}: 2 of {len(questions)} questions have no prediction (the first: {questions[-2].id!r}); "
        "expected one each: let the run finish"
    )


NO_FORMAT = [
    "flickr30k",
    "msvdqa",
    "msrvttqa",
    "coco_drawing",
    "mmbench",
    "pope",
    "geneval",
    "dpg",
    "vist",
    "vist_drawing",
]


@pytest.mark.parametrize("name", NO_FORMAT)
def test_no_format(tmp_path, name):
    write_sample(name, tmp_path)
    assert _refused(name, tmp_path, {}) == (
        f"{tmp_path}/out.json: {name} has no submission format; its predictions are scored here"
    )


def test_a_file_that_cannot_be_written(tmp_path):
    write_sample("mmvet", tmp_path)
    (tmp_path / "file").touch()
    assert _refused("mmvet", tmp_path, {f"v1_{n}": "a" for n in range(4)}, "file/out.json") == (
        f"{tmp_path}/file/out.json: cannot be written (File exists); expected a file's path"
    )
    (tmp_path / "out").mkdir()
    assert "out: cannot be written (Is a directory); " in _refused(
        "mmvet", tmp_path, {f"v1_{n}": "a" for n in range(4)}, "out"
    )


def test_refused_predictions_leave_the_old_file(tmp_path):
    write_sample("mmvet", tmp_path)
    questions = find_benchmark("mmvet").read(tmp_path)
    (tmp_path / "out.json").write_text("old")
    with pytest.raises(UserError, match="no prediction"):
        find_benchmark("mmvet").write_submission(tmp_path / "out.json", questions, {"v1_0": "a"})
    assert (tmp_path / "out.json").read_text() == "old"
