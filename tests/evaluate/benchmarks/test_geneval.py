"""GenEval: the layout of drawings, and scores of detections against the official programs."""

import json
import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emu_jax.errors import UserError
from emu_jax.evaluate.benchmarks.benchmark import Scoring, Weights
from emu_jax.evaluate.benchmarks.geneval import BENCHMARK, RELATIONS, relations
from emu_jax.evaluate.question import Question
from tests.evaluate.benchmarks import geneval_cases as official
from tests.evaluate.benchmarks.editing import read, refused
from tests.evaluate.samples import write_sample

BENCH = {"class": "bench", "score": 0.95, "box": [10, 20, 110, 120], "color": "red"}


def _lines(values) -> str:
    return "".join(json.dumps(value) + "\n" for value in values)


def _score(root, out, *, limit=None, safety=None):
    model = types.SimpleNamespace(decoder=types.SimpleNamespace(safety=safety))
    questions = BENCHMARK.read(root)[:limit]
    predictions = {question.id: f"{question.id}.png" for question in questions}
    return BENCHMARK.score(questions, predictions, Scoring(root, out / "drawn", Weights(), model))


def test_four_drawings_a_prompt_in_the_official_layout(tmp_path):
    write_sample("geneval", tmp_path / "data")
    questions = read("geneval", tmp_path / "data")
    assert list(questions)[:5] == [*(f"00000/samples/000{n}" for n in range(4)), "00001/samples/0000"]
    id = "00002/samples/0003"
    assert questions[id] == Question(id=id, text="a photo of two benchs", kind="counting")
    assert _score(tmp_path / "data", tmp_path / "out") == {}  # nothing was detected yet
    lines = (tmp_path / "data" / "evaluation_metadata.jsonl").read_text().splitlines()
    found = [(tmp_path / "out" / "drawn" / f"{n:05d}" / "metadata.jsonl").read_text() for n in range(len(lines))]
    assert found == lines


# ---------------------------------------------------------------- the official programs


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """Figures of `official.cases()`, and those of each image on its own: from files."""
    root, out = (tmp_path_factory.mktemp(name) for name in ("data", "out"))
    (root / "evaluation_metadata.jsonl").write_text(_lines(official.scenes()))
    rows = [
        {"image": f"{question.id}.png", "objects": objects}
        for question, (scene, objects) in zip(BENCHMARK.read(root), official.cases(), strict=True)
    ]
    (out / "detections.jsonl").write_text(_lines(rows[::-1]))  # in any order
    whole = _score(root, out)
    single = ""
    for number, (scene, objects) in enumerate(official.cases()):
        (root / "evaluation_metadata.jsonl").write_text(_lines([scene, *official.scenes()]))  # all classes are known
        (out / "detections.jsonl").write_text(_lines([{"image": "00000/samples/0000.png", "objects": objects}]))
        single += f"{_score(root, out, limit=1)['correct images'].value:.0f}"
        assert number < len(official.CORRECT)
    return whole, single


def test_each_image_is_as_correct_as_the_official_program_says(scored):
    _, single = scored
    print(f"{len(single)} images, {single.count('1')} correct, expected {official.CORRECT.count('1')}")
    assert single == official.CORRECT and len(single) == 144


def test_figures_are_the_official_summary(scored):
    figures, _ = scored
    right = {name[9:-1]: 24 * figure.value for name, figure in figures.items() if name.startswith("GenEval (")}
    assert right == pytest.approx(official.RIGHT, abs=1e-12) and list(right) == list(official.RIGHT)
    assert f"{figures['GenEval'].value:.5f}" == official.OVERALL
    assert f"{figures['correct images'].value:.2%}" == official.IMAGES
    assert f"{figures['prompts with a correct image'].value:.2%}" == official.PROMPTS
    assert [figures[name].count for name in ("GenEval", "GenEval (position)", "prompts with a correct image")] == [
        144,
        24,
        36,
    ]
    for figure in figures.values():
        assert figure.interval[0] < figure.value < figure.interval[1]


def test_relations_are_the_official_ones():
    found = ""
    for box, target in official.boxes():
        held = relations(np.array(box, np.float32), np.array(target, np.float32))
        found += f"{sum(2**n for n, relation in enumerate(RELATIONS) if relation in held):x}"
    assert found == official.RELATED and len(found) == 120


# ---------------------------------------------------------------- files


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda line: line.pop("tag"), "line 2 has no tag"),
        (lambda line: line["include"][0].update(count=0), "line 2.include[0].count is 0; expected 1 or more"),
        (
            lambda line: line["include"][0].update(color="grey"),
            "line 2.include[0].color is 'grey'; expected one of red, ",
        ),
        (
            lambda line: line["include"][0].update(position=["above", 0]),
            "line 2.include[0].position is a list of 2; expected one of left of, right of, above, below, and ",
        ),
        (lambda line: line.update(exclude={}), "line 2.exclude is a JSON object; expected a list"),
    ],
)
def test_wrong_prompts(tmp_path, change, expected):
    write_sample("geneval", tmp_path)
    path = tmp_path / "evaluation_metadata.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    change(lines[1])
    path.write_text(_lines(lines))
    assert refused("geneval", tmp_path).startswith(f"evaluation_metadata.jsonl: {expected}")


@pytest.fixture
def one(tmp_path):
    """Scores one drawing of a prompt, and its detections."""
    (tmp_path / "data").mkdir()
    clause = {"class": "bench", "count": 1, "color": "red"}
    prompts = [{"tag": "colors", "include": [clause], "prompt": "a photo of a red bench"}]
    (tmp_path / "data" / "evaluation_metadata.jsonl").write_text(_lines(prompts))
    (tmp_path / "out").mkdir()

    def score(rows, **options):
        text = rows if isinstance(rows, str) else _lines(rows)
        (tmp_path / "out" / "detections.jsonl").write_text(text)
        return _score(tmp_path / "data", tmp_path / "out", limit=1, **options)

    return score


def _row(**changes):
    return {"image": "00000/samples/0000.png", "objects": [BENCH | changes]}


@pytest.mark.parametrize(
    ("changes", "value"),
    [
        ({}, 1.0),
        ({"color": "blue"}, 0.0),
        ({"score": 0.3}, 0.0),  # not above the threshold
        ({"score": 0.3000001}, 1.0),
    ],
)
def test_one_detection(one, changes, value):
    assert one([_row(**changes)])["GenEval"].value == value
    assert one([{"image": "00000/samples/0000.png", "objects": []}])["GenEval"].value == 0.0


def test_of_equal_scores_the_later_detection_comes_first(one):
    objects = [BENCH | {"color": color} for color in ("blue", "green", "red")]
    for shown, value in ((objects, 1.0), (objects[::-1], 0.0)):
        assert one([{"image": "00000/samples/0000.png", "objects": shown}])["GenEval"].value == value


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([], "has no image '00000/samples/0000.png'; expected a line for each of the 1 drawn images, without what was"),
        ([_row(), _row()], "line 2 has the image '00000/samples/0000.png' again, after line 1; expected each once"),
        ([_row(), {"image": "x.png"}], "line 2.image is 'x.png'; expected the name of a drawn image, such as '00000/"),
        ([{"image": "00000/samples/0000.png"}], "line 1 has no objects"),
        (
            [_row(**{"class": "benhc"})],
            "line 1.objects[0].class is 'benhc'; expected a class of evaluation_metadata.jsonl",
        ),
        ([_row(score=98.0)], "line 1.objects[0].score is 98.0; expected a number from 0 to 1"),
        ([_row(score="1")], "line 1.objects[0].score is '1'; expected a number"),
        ([_row(box=[1, 2, 3])], "line 1.objects[0].box is a list of 3; expected left, top, right and bottom in pixels"),
        ([_row(box=[1, 2, 3, float("nan")])], "line 1.objects[0].box[3] is nan; expected a number"),
        ([_row(box=[1, 2, 3, 1e7])], "line 1.objects[0].box is a list of 4; expected left, top, right and bottom"),
        ([_row(color="grey")], "line 1.objects[0].color is 'grey'; expected one of red, orange, "),
        (
            [{"image": "00000/samples/0000.png", "objects": [{k: v for k, v in BENCH.items() if k != "color"}]}],
            "line 1.objects[0].color is None; expected one of red, orange, yellow, green, blue, purple, pink, brown, "
            "black, white, because the prompt asks for a colour",
        ),
    ],
)
def test_wrong_detections(one, rows, expected):
    with pytest.raises(UserError) as caught:
        one(rows)
    message = str(caught.value)
    assert f"detections.jsonl: {expected}" in message and "\n" not in message


def test_black_images_are_not_scored(one):
    with pytest.raises(UserError, match="the model has a safety checker"):
        one([_row()], safety=object())


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=3)
    | st.sampled_from(["bench", "red", 10**400]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["image", *BENCH]), inner, max_size=4),
    max_leaves=6,
)


@settings(max_examples=60)
@given(field=st.sampled_from(["image", "objects", *BENCH]), value=JSON)
def test_any_value_is_scored_or_refused_in_one_line(tmp_path_factory, field, value):
    root, out = (tmp_path_factory.mktemp(name) for name in ("data", "out"))
    prompts = [{"tag": "colors", "include": [{"class": "bench", "count": 1, "color": "red"}], "prompt": "a red bench"}]
    (root / "evaluation_metadata.jsonl").write_text(_lines(prompts))
    row = _row(**{field: value}) if field in BENCH else _row() | {field: value}
    (out / "detections.jsonl").write_text(_lines([row]))
    try:
        assert _score(root, out, limit=1)["GenEval"].value in (0.0, 1.0)
    except UserError as error:
        assert "\n" not in str(error) and "detections.jsonl" in str(error)
