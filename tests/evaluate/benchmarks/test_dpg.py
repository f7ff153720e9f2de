"""DPG-Bench: grids of drawings, and scores of answers against the official program."""

import csv
import json
import types

import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emu_jax.errors import UserError
from emu_jax.evaluate.benchmarks.benchmark import Scoring, Weights
from emu_jax.evaluate.benchmarks.dpg import BENCHMARK, COLUMNS, Asked, drawing_score, read_items
from emu_jax.evaluate.question import Question
from tests.evaluate.benchmarks import dpg_cases as official
from tests.evaluate.benchmarks.editing import read, refused
from tests.evaluate.samples import write_sample

SIDE = 6


def _draw(out, questions) -> None:
    """A drawing of one colour for each question."""
    for number, question in enumerate(questions):
        path = out / "drawn" / f"{question.id}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.new("RGB", (SIDE, SIDE), (number, 7, 9)).save(path)


def _score(root, out, *, limit=None, safety=None):
    questions = BENCHMARK.read(root)[:limit]
    predictions = {question.id: f"{question.id}.png" for question in questions}
    model = types.SimpleNamespace(decoder=types.SimpleNamespace(safety=safety))
    return BENCHMARK.score(questions, predictions, Scoring(root, out / "drawn", Weights(), model))


def _answer(out, answers) -> None:
    """`answers`: by item, those about each drawing."""
    rows = [
        {"image": f"{item}/{number}.png", "answers": said}
        for item, drawings in answers.items()
        for number, said in enumerate(drawings)
    ]
    (out / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[::-1]))


# ---------------------------------------------------------------- drawings


def test_four_drawings_a_prompt(tmp_path):
    write_sample("dpg", tmp_path)
    questions = read("dpg", tmp_path)
    assert list(questions) == [f"{item}/{n}" for item in ("partiprompts97", "drawtext3") for n in range(4)]
    text = "Two bales of hay, one of them red, in a field."
    assert questions["drawtext3/2"] == Question(id="drawtext3/2", text=text)


def test_grids_for_the_official_program(tmp_path):
    write_sample("dpg", tmp_path / "data")
    _draw(tmp_path / "out", BENCHMARK.read(tmp_path / "data"))
    assert _score(tmp_path / "data", tmp_path / "out") == {}  # nothing was asked yet
    grids = tmp_path / "out" / "grids"
    assert sorted(path.name for path in grids.iterdir()) == ["drawtext3.png", "partiprompts97.png"]
    pixels = np.asarray(PIL.Image.open(grids / "drawtext3.png"))
    assert pixels.shape == (2 * SIDE, 2 * SIDE, 3)
    expected = np.kron([[4, 5], [6, 7]], np.ones((SIDE, SIDE)))  # the second prompt's drawings
    np.testing.assert_array_equal(pixels[..., 0], expected)


def test_a_prompt_without_all_its_drawings_has_no_grid(tmp_path):
    write_sample("dpg", tmp_path / "data")
    _draw(tmp_path / "out", BENCHMARK.read(tmp_path / "data")[:6])
    assert _score(tmp_path / "data", tmp_path / "out", limit=6) == {}
    assert [path.name for path in (tmp_path / "out" / "grids").iterdir()] == ["partiprompts97.png"]


def test_black_images_are_not_scored(tmp_path):
    write_sample("dpg", tmp_path / "data")
    with pytest.raises(UserError, match="the model has a safety checker"):
        _score(tmp_path / "data", tmp_path / "out", safety=object())


# ---------------------------------------------------------------- the official program


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    official.write_table(root / "dpg_bench.csv")
    (root / "prompts").mkdir()
    for item in official.answers():
        (root / "prompts" / f"{item}.txt").write_text("A prompt, at length")
    return root


def test_figures_are_the_official_programs(data, tmp_path):
    _draw(tmp_path, BENCHMARK.read(data))
    _answer(tmp_path, official.answers())
    figures = _score(data, tmp_path)
    found = {name: figure.value for name, figure in figures.items()}
    difference = max(abs(found[name] - value) for name, value in official.FIGURES.items())
    print(f"largest difference {difference:.1e} of 100")
    assert found.keys() == official.FIGURES.keys() and difference < 1e-12
    assert figures["DPG-Bench"].count == len(official.answers()) - len(official.FAILED)
    for figure in figures.values():
        assert figure.interval[0] < figure.value < figure.interval[1]


def test_each_prompts_score_is_the_official_programs(data):
    items = read_items(BENCHMARK.files(data))
    means, failed = [], []
    for item, drawings in official.answers().items():
        scores = [
            drawing_score(items[item], {number: said[str(number)] for number in items[item]}) for said in drawings
        ]
        if None in scores:
            failed.append(item)
        else:
            means.append(sum(scores) / 4)
    assert tuple(failed) == official.FAILED
    assert means == [float(word) for word in official.MEANS.split()]


@given(
    parents=st.lists(st.lists(st.integers(1, 6), max_size=3), min_size=6, max_size=6),
    said=st.lists(st.booleans(), min_size=6, max_size=6),
)
def test_a_question_counts_if_all_that_it_depends_on_do(parents, said):
    """Where questions only depend on earlier ones: on their parents, and on what those depend on."""
    earlier = [tuple(n for n in some if n <= place) for place, some in enumerate(parents)]

    def counts(number: int) -> bool:
        return said[number - 1] and all(counts(parent) for parent in earlier[number - 1])

    item = {n: Asked("", earlier[n - 1], "") for n in range(1, 7)}
    given_answers = {n: "yes" if said[n - 1] else "no" for n in range(1, 7)}
    assert drawing_score(item, given_answers) == sum(map(counts, range(1, 7))) / 6


# ---------------------------------------------------------------- files


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ("proposition_id", "question_id", "no column proposition_id; expected item_id, "),
        (",2,1,", ",two,1,", "line 3.proposition_id is 'two'; expected the number of a question"),
        (",2,1,", ",2,1;3,", "line 3.dependency is '1;3'; expected the number of a question, or several"),
        ("drawtext3,", ",", "line 4.item_id is ''; expected the name of a file in prompts/, without .txt"),
    ],
)
def test_wrong_tables(tmp_path, before, after, expected):
    write_sample("dpg", tmp_path)
    path = tmp_path / "dpg_bench.csv"
    path.write_text(path.read_text().replace(before, after))
    assert refused("dpg", tmp_path).startswith(f"dpg_bench.csv: {expected}")


def test_wrong_prompts(tmp_path):
    write_sample("dpg", tmp_path)
    path = tmp_path / "dpg_bench.csv"
    table = path.read_text()
    path.write_text(table.replace("drawtext3,", "../drawtext3,"))
    assert "which leads out of the folder" in refused("dpg", tmp_path)
    path.write_text(table)
    (tmp_path / "prompts" / "drawtext3.txt").write_text("\n")
    assert refused("dpg", tmp_path) == "prompts/drawtext3.txt: holds no text; expected a prompt"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            lambda a: a.pop("drawtext3"),
            "has no image 'drawtext3/0.png' (and 3 more); expected a line for each of the 8",
        ),
        (lambda a: a["drawtext3"][1].pop("2"), "line 3.answers has no 2"),
        (lambda a: a["drawtext3"][1].update({"2": True}), "line 3.answers.2 is True; expected a text"),
        (lambda a: a.update(vrd1=[{}]), "line 1.image is 'vrd1/0.png'; expected the name of a drawn image"),
    ],
)
def test_wrong_answers(tmp_path, change, expected):
    write_sample("dpg", tmp_path / "data")
    _draw(tmp_path / "out", BENCHMARK.read(tmp_path / "data"))
    answers = {item: [{"1": "yes", "2": "yes"} for _ in range(4)] for item in ("partiprompts97", "drawtext3")}
    change(answers)
    _answer(tmp_path / "out", answers)
    with pytest.raises(UserError) as caught:
        _score(tmp_path / "data", tmp_path / "out")
    assert f"answers.jsonl: {expected}" in str(caught.value) and "\n" not in str(caught.value)


CELLS = st.text(st.characters(categories=["L", "N", "P", "Zs", "Cc"]), max_size=4) | st.sampled_from(
    ["../a", "1,2", "0"]
)


@settings(max_examples=60)
@given(cells=st.lists(st.lists(CELLS, min_size=5, max_size=5), min_size=1, max_size=4))
def test_any_cells_are_read_or_refused_in_one_line(tmp_path_factory, cells):
    root = tmp_path_factory.mktemp("any")
    (root / "prompts").mkdir()
    with (root / "dpg_bench.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([COLUMNS, *cells])
    try:
        BENCHMARK.read(root)
    except UserError as error:
        assert "\n" not in str(error) and str(root) in str(error)
