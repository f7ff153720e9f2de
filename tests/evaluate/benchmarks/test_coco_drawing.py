"""Captions to draw: which are chosen, and the real images."""

import json

import pytest

from emu_jax.errors import UserError
from emu_jax.evaluate.benchmarks import coco_drawing
from emu_jax.evaluate.benchmarks.coco_drawing import BENCHMARK, real_images
from emu_jax.evaluate.question import Question
from tests.evaluate.benchmarks.editing import read
from tests.evaluate.samples import HELD_OUT, VAL_IDS, people, write_sample


def test_one_caption_an_image_and_nothing_shown(tmp_path):
    write_sample("coco_drawing", tmp_path)
    found = read("coco_drawing", tmp_path)
    captions = dict(zip(map(str, VAL_IDS), people(HELD_OUT), strict=True))
    assert found.keys() == captions.keys()
    for key, question in found.items():
        assert question == Question(id=key, text=question.text) and question.text in captions[key].captions


def test_fewer_captions_are_the_first_of_more(tmp_path, monkeypatch):
    """Of 300 images with two captions each."""
    images = [{"id": n, "file_name": f"{n}.jpg"} for n in range(300)]
    annotations = [{"id": n, "image_id": n // 2, "caption": f"caption {n}"} for n in range(600)]
    path = tmp_path / "captions_val2014.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations}))
    every = BENCHMARK.read(tmp_path)
    monkeypatch.setattr(coco_drawing, "CAPTIONS", 100)
    path.write_text(json.dumps({"images": images[::-1], "annotations": annotations[::-1]}))
    assert BENCHMARK.read(tmp_path) == every[:100]
    ids = [int(question.id) for question in every]
    assert sorted(ids) == list(range(300)) and ids != sorted(ids)
    second = [int(question.text.split()[1]) % 2 for question in every]
    assert 110 < sum(second) < 190  # both captions are taken, about equally often
    assert (every[0].id, every[0].text) == ("16", "caption 32")  # for everyone, and for ever


def test_real_images(tmp_path):
    write_sample("coco_drawing", tmp_path)
    names = [f"COCO_val2014_{image:012d}.jpg" for image in VAL_IDS]
    assert real_images(tmp_path) == [tmp_path / "val2014" / name for name in names]
    questions = BENCHMARK.read(tmp_path)[:2]
    assert [path.name for path in real_images(tmp_path, questions)] == [
        f"COCO_val2014_{int(question.id):012d}.jpg" for question in questions
    ]
    with pytest.raises(UserError, match=r"the questions: has question 'v1_0', which .*captions_val2014.json has not; "):
        real_images(tmp_path, [Question(id="v1_0")])
    for name in names[1:3]:
        (tmp_path / "val2014" / name).unlink()
    with pytest.raises(UserError, match=rf": no val2014/{names[1]} \(and 1 more\); coco_drawing expects there: "):
        real_images(tmp_path)
    assert len(BENCHMARK.read(tmp_path)) == 4  # prompts need no image
