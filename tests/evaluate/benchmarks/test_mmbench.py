"""MMBench: rows, rotations and images in base64; its figures against VLMEvalKit's."""

import base64
import csv
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emu_jax.errors import UserError
from emu_jax.evaluate.benchmarks.mmbench import BENCHMARK, COLUMNS, SEPARATOR, asks, prompt
from emu_jax.evaluate.multiple_choice import LETTERS
from emu_jax.evaluate.predict import read_images
from emu_jax.evaluate.question import Question
from emu_jax.generate.candidates import CandidateScores
from tests.evaluate.benchmarks.editing import read, refused
from tests.evaluate.choice_samples import mmbench_rows, write_rows
from tests.evaluate.people import HELD_OUT, encoded, people
from tests.evaluate.samples import write_sample

FILE = "MMBench_DEV_EN.tsv"


@pytest.fixture
def mmbench(tmp_path):
    write_sample("mmbench", tmp_path / "mmbench")
    return tmp_path / "mmbench"


def test_each_question_is_followed_by_its_rotations(mmbench):
    found = read("mmbench", mmbench)
    assert list(found)[:8] == ["0", "1000000", "2000000", "3000000", "1", "1000001", "100", "1000100"]
    tones = ("light", "medium", "medium-dark", "medium-light")
    ability = "finegrained_perception (instance-level) / attribute_recognition"
    text = "What skin tone does the person have?"
    rotated = ("medium-light", *tones[:3])
    images = found["0"].images
    assert found["0"] == Question("0", images, text=text, answers=("D",), kind=ability, candidates=tones)
    assert found["1000000"] == Question("1000000", images, text=text, answers=("A",), kind=ability, candidates=rotated)
    assert found["1000001"] == Question(
        "1000001",
        images,
        hint="The image is an emoji.",
        text="Is this a photo?",
        answers=("A",),
        kind="coarse_perception / image_style",
        candidates=("no", "yes"),
    )


def test_images_are_those_of_the_rows_that_have_them(mmbench):
    found = read("mmbench", mmbench)
    for number, person in enumerate(people(HELD_OUT)):
        for index in (100 * number, 100 * number + 1, 1_000_000 + 100 * number):
            np.testing.assert_array_equal(read_images(found[str(index)], 128), [person.pixels])


def test_an_image_in_every_row(mmbench):
    """As in older files; equal images are one."""
    rows = mmbench_rows(answered=True)
    images = {row["index"]: row["image"] for row in rows}
    for row in rows:
        row["image"] = images.get(row["image"], row["image"])
    (mmbench / FILE).unlink()
    write_rows(mmbench / "mmbench_dev_20230712.tsv", rows)
    found = read("mmbench", mmbench)
    assert found == read("mmbench", mmbench, "dev-v11")
    assert len({id(question.images[0]) for question in found.values()}) == len(people(HELD_OUT))


def test_the_test_split_has_no_answers(mmbench):
    assert {question.answers for question in read("mmbench", mmbench, "test").values()} == {()}


def test_a_rotation_without_its_question_is_left_out(mmbench):
    rows = [row for row in mmbench_rows(answered=True) if row["index"] != 1]
    write_rows(mmbench / FILE, rows)
    assert not {"1", "1000001"} & set(read("mmbench", mmbench)) and len(read("mmbench", mmbench)) == len(rows) - 1


def test_empty_cells(mmbench):
    rows = mmbench_rows(answered=True)
    rows[0] |= {"hint": "nan", "D": "", "answer": "A"}
    write_rows(mmbench / FILE, rows)
    question = read("mmbench", mmbench)["0"]
    assert question.hint == "" and question.candidates == ("light", "medium", "medium-dark")


WORD, NOT_ENCODED = "not an image", "x" * 65
NO_IMAGE = base64.b64encode(b"text" * 20).decode()


WHOLE = "; expected a whole JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF or PPM file"


@pytest.mark.parametrize(
    ("row", "change", "expected"),
    [
        (0, {"index": "one"}, "line 2.index is 'one'; expected a whole number"),
        (1, {"index": "0"}, "line 3 has the index 0 again, after line 2; expected each once"),
        (1, {"image": "7"}, "line 3.image is '7'; expected an image in base64, or the index of a row that has one"),
        (1, {"image": ""}, "line 3.image is ''; expected an image in base64, or the index of another row"),
        (1, {"image": WORD}, f"line 3.image is '{WORD}'; expected an image in base64, or the index of another row"),
        (0, {"image": NO_IMAGE}, "line 2, image: not a readable image (its first bytes are those of no image)"),
        (0, {"image": NOT_ENCODED}, f"line 2.image is '{NOT_ENCODED[:59]}…; expected an image in base64"),
        (1, {"B": ""}, "line 3.answer is 'B'; expected the letter of one of 1 options, A"),
        (1, {"A": ""}, "line 3.A is ''; expected an option, because a later one is there"),
        (1, {"A": "", "B": ""}, "line 3.A is ''; expected 1 to 26 options"),
        (1, {"answer": "C"}, "line 3.answer is 'C'; expected the letter of one of 2 options, A, B"),
    ],
)
def test_wrong_rows(mmbench, row, change, expected):
    rows = mmbench_rows(answered=True)
    rows[row] |= change
    write_rows(mmbench / FILE, rows)
    found = refused("mmbench", mmbench)
    assert found.removesuffix(WHOLE) == f"{FILE}: {expected}"


@pytest.mark.long
@settings(max_examples=60)
@given(data=st.data())
def test_any_cell_is_read_or_refused_in_one_line(data, tmp_path_factory):
    root = tmp_path_factory.mktemp("mmbench")
    rows = mmbench_rows(answered=True)
    row = data.draw(st.sampled_from(rows))
    cells = st.one_of(st.text(st.characters(exclude_categories=["Cs"]), max_size=80), st.sampled_from(["0", "../a"]))
    row[data.draw(st.sampled_from([*COLUMNS, "hint", "answer"]))] = data.draw(cells)
    write_rows(root / FILE, rows)
    try:
        questions = BENCHMARK.read(root)
    except UserError as error:
        assert "\n" not in str(error) and str(root / FILE) in str(error)
    else:
        assert all(question.answers[0] in LETTERS[: len(question.candidates)] for question in questions)


def test_prompts():
    image = np.zeros((2, 2, 3), np.uint8)
    question = Question("1", (image,), hint="A.\nB", text="Which?", candidates=("no", "yes"), answers=("A",))
    asked = (
        "Hint: A.\nB\nQuestion: Which?\nOptions:\nA. no\nB. yes\n"
        "Please select the correct answer from the options above. \n"
    )
    assert asks(question) == asked
    for chat, end in ((True, f"{asked} [ASSISTANT]:"), (False, f" {asked}Answer:")):
        calls = prompt(question, [image], [], chat)
        call = next(calls)
        assert call.candidates == ("A", "B") and call.parts[-1] == end and call.parts[-2] is image
        with pytest.raises(StopIteration) as done:
            calls.send(CandidateScores(np.array([2.0, 1.0], np.float32), np.array([1, 1]), 9, np.zeros(2, bool)))
        assert done.value.value["sum"] == [2.0, 1.0]


# ---------------------------------------------------------------- figures

ABILITIES = {
    "coarse_perception": ("image_scene", "image_style"),
    "logic_reasoning": ("future_prediction",),
    "finegrained_perception (instance-level)": ("ocr", "object_localization"),
}


def cases() -> tuple[list[dict[str, str]], dict[str, str]]:
    """124 rows of the table, and a letter for each index: right for all rotations, for some or for none."""
    rng = random.Random(0)
    rows: list[dict[str, str]] = []
    letters = {}
    for index in rng.sample(range(3000), 40):
        ability = rng.choice(sorted(ABILITIES))
        category, count = rng.choice(ABILITIES[ability]), rng.choice([2, 3, 4])
        answer, luck = rng.randrange(count), rng.choice([0.3, 0.9, 1.0])
        for rotation in range(count):
            options = [f"option {(place - rotation) % count} of {index}" for place in range(count)]
            right = LETTERS[(answer + rotation) % count]
            key = str(index + 1_000_000 * rotation)
            row = {"index": key, "question": f"question {index}", **dict(zip("ABCD", options, strict=False))}
            rows.append(row | {"answer": right, "category": category, "l2-category": ability, "split": "dev"})
            letters[key] = right if rng.random() < luck else rng.choice(LETTERS[:count])
    return rows, letters


# What VLMEvalKit at e8e78f05 (vlmeval/dataset/utils/multiple_choice.py) gives for `cases()`: `report_acc` of
# `mcq_circular_eval`, and of `mcq_vanilla_eval` on the rows with an index of up to a million, both by exact matching.
CIRCULAR = {
    "": 24 / 40,
    " (coarse_perception)": 5 / 14,
    " (finegrained_perception (instance-level))": 12 / 17,
    " (logic_reasoning)": 7 / 9,
    " (future_prediction)": 7 / 9,
    " (image_scene)": 2 / 7,
    " (image_style)": 3 / 7,
    " (object_localization)": 6 / 10,
    " (ocr)": 6 / 7,
}
VANILLA = {
    "": 32 / 40,
    " (coarse_perception)": 10 / 14,
    " (finegrained_perception (instance-level))": 14 / 17,
    " (logic_reasoning)": 8 / 9,
    " (future_prediction)": 8 / 9,
    " (image_scene)": 5 / 7,
    " (image_style)": 5 / 7,
    " (object_localization)": 8 / 10,
    " (ocr)": 6 / 7,
}


def test_figures_are_those_of_the_official_program():
    rows, letters = cases()
    questions, predictions = [], []
    for row in sorted(rows, key=lambda row: (int(row["index"]) % 1_000_000, int(row["index"]))):
        options = tuple(row[letter] for letter in "ABCD" if letter in row)
        kind = f"{row['l2-category']}{SEPARATOR}{row['category']}"
        questions.append(Question(row["index"], answers=(row["answer"],), kind=kind, candidates=options))
        predictions.append({"sum": [float(letter != letters[row["index"]]) for letter in LETTERS[: len(options)]]})
    figures = BENCHMARK.metrics(predictions, questions, None)
    expected = {f"CircularEval by letter{name}": value for name, value in CIRCULAR.items()}
    expected |= {f"accuracy by letter{name}": value for name, value in VANILLA.items()}
    assert {name: figure.value for name, figure in figures.items()} == pytest.approx(expected, abs=1e-12)
    of_two = [question for question in questions if len(question.candidates) == 2]
    kept = [predictions[questions.index(question)] for question in of_two]
    by_luck = BENCHMARK.metrics(kept, of_two, None)
    assert by_luck["CircularEval by letter"].chance == 0.25 and by_luck["accuracy by letter"].chance == 0.5


def test_no_circular_eval_without_rotations(mmbench):
    questions = [question for key, question in read("mmbench", mmbench).items() if int(key) < 1_000_000]
    predictions = [{"sum": [0.0] + [1.0] * (len(question.candidates) - 1)} for question in questions]
    figures = BENCHMARK.metrics(predictions, questions, None)
    assert all(name.startswith("accuracy by letter") for name in figures)
    assert figures["accuracy by letter"].value == np.mean([question.answers == ("A",) for question in questions])


def test_the_largest_images_fit_in_a_cell(mmbench):
    """The limit of Python's CSV reader is lower, and holds again afterwards."""
    noise = np.random.default_rng(0).integers(0, 256, (400, 400, 3), np.uint8)
    rows = mmbench_rows(answered=True)
    rows[0]["image"] = base64.b64encode(encoded(noise)).decode()
    before = csv.field_size_limit()
    assert len(rows[0]["image"]) > before
    write_rows(mmbench / FILE, rows)
    np.testing.assert_array_equal(read("mmbench", mmbench)["0"].images[0](), noise)
    assert csv.field_size_limit() == before
