"""Examples: the nearest images, the nearest last; never the question's own; an index that is built once."""

import numpy as np
import pytest

from emu_jax.data.images import StoredImage
from emu_jax.errors import UserError
from emu_jax.evaluate.few_shot import choose_examples, index
from emu_jax.evaluate.question import Question
from tests.evaluate.people import encoded


class Means:
    """An image's mean colour, and how often it was asked for."""

    name, size = "means", 4

    def __init__(self):
        self.calls = 0

    def __call__(self, images: np.ndarray) -> np.ndarray:
        self.calls += 1
        return images.astype(np.float32).mean((1, 2))  # [N, 3]


def _coloured(id: str, *colour: int, answers: tuple[str, ...] = ("a",)) -> Question:
    return Question(id, (np.full((4, 4, 3), colour, np.uint8),), answers=answers)


POOL = [_coloured("red", 250, 0, 0), _coloured("pink", 250, 90, 90), _coloured("blue", 0, 0, 250)]
POOL += [_coloured("unanswered", 251, 0, 0, answers=())]


def test_the_nearest_come_last_and_those_without_answers_never(tmp_path):
    asked = [_coloured("1", 240, 5, 5), _coloured("2", 5, 5, 240)]
    choose = choose_examples(POOL, asked, 2, Means(), tmp_path)
    assert [[example.id for example, shown in choose(question)] for question in asked] == [
        ["pink", "red"],
        ["pink", "blue"],
    ]
    assert all(shown for _, shown in choose(asked[0]))


def test_an_index_is_built_once_and_an_image_encoded_once(tmp_path):
    features = Means()
    twice = [*POOL, Question("again", POOL[0].images, answers=("b",))]
    found = index(twice, features, tmp_path)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1.0, rtol=1e-6)
    np.testing.assert_array_equal(found[0], found[-1])
    assert features.calls == 1
    np.testing.assert_array_equal(index(twice, features, tmp_path), found)
    assert features.calls == 1
    index(POOL[:2], features, tmp_path)
    assert features.calls == 2, "other images are another index"


def test_the_question_s_own_image_is_no_example(tmp_path):
    from PIL import Image

    files = []
    for name, colour in (("own", (250, 0, 0)), ("other", (0, 250, 0))):
        files.append(tmp_path / f"{name}.png")
        Image.new("RGB", (4, 4), colour).save(files[-1])
    pool = [Question(file.stem, (file,), answers=("a",)) for file in files]
    asked = [Question("1", (files[0],))]
    choose = choose_examples(pool, asked, 1, Means(), tmp_path)
    assert [example.id for example, _ in choose(asked[0])] == ["other"]


def test_a_table_s_image_is_no_example_for_itself(tmp_path):
    pixels = {"red": (250, 0, 0), "green": (0, 250, 0)}
    data = {name: encoded(np.full((4, 4, 3), colour, np.uint8)) for name, colour in pixels.items()}
    pool = [Question(name, (StoredImage(data[name], f"row {name}"),), answers=("a",)) for name in data]
    asked = [Question("1", (StoredImage(data["red"], "another row"),))]
    choose = choose_examples(pool, asked, 1, Means(), tmp_path)
    assert [example.id for example, _ in choose(asked[0])] == ["green"]


def test_text_only_examples_are_the_same_for_all_and_show_nothing(tmp_path):
    asked = [_coloured("1", 240, 5, 5), _coloured("2", 5, 5, 240)]
    choose = choose_examples(POOL, asked, 0, None, tmp_path, text_examples=True)
    first, second = choose(asked[0]), choose(asked[1])
    assert first == second
    assert [shown for _, shown in first] == [False, False]


def test_too_few_examples_are_told(tmp_path):
    with pytest.raises(UserError, match="4 few-shot examples: 3 answered questions to choose from; expected 5 or more"):
        choose_examples(POOL, [], 4, Means(), tmp_path)
