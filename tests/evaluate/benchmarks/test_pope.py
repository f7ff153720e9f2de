"""POPE."""

import pytest

from emu_jax.evaluate.benchmarks.benchmark import Scoring, Weights
from emu_jax.evaluate.benchmarks.registry import find_benchmark
from emu_jax.evaluate.question import Question
from tests.evaluate.benchmarks.editing import edit, read, refused
from tests.evaluate.samples import write_sample

FILE = "coco_pope_popular.json"


@pytest.fixture
def pope(tmp_path):
    write_sample("pope", tmp_path)
    return tmp_path


def test_questions(pope):
    found = read("pope", pope)
    assert len(found) == 3 * 16
    assert list(found)[14:18] == ["random/15", "random/16", "popular/1", "popular/2"]
    assert found["popular/2"] == Question(
        id="popular/2",
        images=(pope / "val2014" / "COCO_val2014_000000000042.jpg",),
        text="Is there a car in the image?",
        answers=("no",),
        kind="popular",
    )
    assert found["popular/2"].images[0] is found["random/1"].images[0]
    for kind in ("random", "popular", "adversarial"):
        assert read("pope", pope, kind) == {key: q for key, q in found.items() if q.kind == kind}


def test_the_layout_of_the_repository(pope):
    (pope / "output" / "coco").mkdir(parents=True)
    (pope / "coco").mkdir()
    (pope / FILE).rename(pope / "output" / "coco" / FILE)
    (pope / "coco_pope_random.json").rename(pope / "coco" / "coco_pope_random.json")
    (pope / "images").mkdir()
    (pope / "val2014").rename(pope / "images" / "val2014")
    assert len(read("pope", pope)) == 48


def test_ends_of_lines_as_published(pope):
    """Two of the official files end their lines in CR LF."""
    before = read("pope", pope)
    path = pope / FILE
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n") + b"\r\n")
    assert read("pope", pope) == before


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda d: d[4].update(label="maybe"), "line 5.label is 'maybe'; expected 'yes' or 'no'"),
        (lambda d: d[4].pop("text"), "line 5 has no text"),
        (lambda d: d[4].update(question_id="5"), "line 5.question_id is '5'; expected a whole number"),
        (
            lambda d: d[4].update(question_id=2),
            "line 5 has the question_id 2 again, after line 2; expected each once",
        ),
        (lambda d: d.insert(3, [1, 2]), "line 4 is a list of 2; expected a JSON object"),
    ],
)
def test_wrong_files(pope, change, expected):
    edit(pope / FILE, change)
    assert refused("pope", pope) == refused("pope", pope, "popular") == f"{FILE}: {expected}"
    assert len(read("pope", pope, "random")) == 16


def test_a_line_that_is_cut(pope):
    path = pope / FILE
    path.write_text(path.read_text()[:-10])
    assert refused("pope", pope).startswith(f"{FILE}: not JSON at line 16, column ")


def test_an_image_that_leads_out_of_the_folder(pope):
    edit(pope / FILE, lambda d: d[0].update(image="../../a.jpg"))
    assert (
        refused("pope", pope) == "ROOT: annotations name the file 'val2014/../../a.jpg', which leads out of the folder"
    )


def test_scores_by_kind(pope):
    benchmark = find_benchmark("pope")
    scoring = Scoring(pope, pope, Weights(), emu=None)
    questions = benchmark.read(pope)
    # Everything is said to be there, but for random objects that are not.
    said = {q.id: "no, there is none" if q.kind == "random" and q.answers == ("no",) else "yes" for q in questions}
    figures = benchmark.score(questions, said, scoring)
    values = {name: round(figures[name].value, 4) for name in figures if name.startswith(("accuracy", "F1"))}
    assert values == {
        "accuracy": 0.6667,
        "F1": 0.75,
        "accuracy (random)": 1.0,
        "F1 (random)": 1.0,
        "accuracy (popular)": 0.5,
        "F1 (popular)": 0.6667,
        "accuracy (adversarial)": 0.5,
        "F1 (adversarial)": 0.6667,
        "F1, mean of the kinds": 0.7778,
    }
    alone = benchmark.read(pope, "popular")
    assert list(benchmark.score(alone, said, scoring)) == ["accuracy", "precision", "recall", "F1", "yes ratio"]
