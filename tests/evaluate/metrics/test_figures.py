"""What the questions of a benchmark have in common."""

from pathlib import Path

import numpy as np

from emu_jax.data.images import StoredImage
from emu_jax.evaluate import intervals
from emu_jax.evaluate.metrics.figures import by_kind, subjects
from emu_jax.evaluate.question import Question
from tests.evaluate.people import encoded


def test_questions_about_one_image_or_video_are_one_subject():
    a, b, clip = Path("a.jpg"), Path("b.jpg"), Path("video.mp4")
    pixels = np.zeros((2, 2, 3), np.uint8)
    shown = [{"images": (a,)}, {"images": (b,)}, {"images": (a,)}, {"images": (a, b)}, {"video": clip}, {"video": clip}]
    shown += [{"images": (pixels,)}, {"images": (pixels,)}, {}, {}]
    found = subjects([Question(str(n), **fields) for n, fields in enumerate(shown)])
    assert found.tolist() == [0, 1, 0, 2, 3, 3, 4, 4, 5, 6]


def test_intervals_of_types_draw_images_too():
    """Two types, five questions an image: alike for an image, so that a type's interval is that of its images."""
    questions = [Question(f"{n}", images=(Path(f"{n // 10}"),), kind="what" if n % 2 else "who") for n in range(400)]
    values = np.repeat(np.random.default_rng(0).integers(0, 2, 40), 10)
    figures = by_kind("accuracy", values, questions, intervals.share)
    assert figures.keys() == {"accuracy", "accuracy (what)", "accuracy (who)"}
    of_images = intervals.wilson(int(values[::10].sum()), 40)
    for name, figure in figures.items():
        np.testing.assert_allclose(figure.interval, of_images, atol=0.04, err_msg=name)


def test_chances_of_types_are_those_of_their_questions():
    questions = [Question(f"{n}", kind="few" if n < 2 else "many") for n in range(4)]
    figures = by_kind("accuracy", [1, 0, 1, 1], questions, intervals.share, [0.5, 0.5, 0.25, 0.25])
    assert {name: (figure.value, figure.chance) for name, figure in figures.items()} == {
        "accuracy": (0.75, 0.375),
        "accuracy (few)": (0.5, 0.5),
        "accuracy (many)": (1.0, 0.25),
    }


def test_rows_with_one_image_of_a_table_are_one_subject():
    data = [encoded(np.full((2, 2, 3), value, np.uint8)) for value in (0, 9)]
    shown = [StoredImage(data[0], "row 0"), StoredImage(data[1], "row 1"), StoredImage(data[0], "row 2")]
    assert subjects([Question(str(n), (image,)) for n, image in enumerate(shown)]).tolist() == [0, 1, 0]
