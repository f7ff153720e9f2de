"""Captions to draw: which are chosen, and the real images."""

import json
import types

import numpy as np
import pytest

from emu_jax.errors import UserError
from emu_jax.evaluate.benchmarks import coco_drawing
from emu_jax.evaluate.benchmarks.benchmark import Scoring, Weights
from emu_jax.evaluate.benchmarks.coco_drawing import BENCHMARK, LIST, real_images
from emu_jax.evaluate.metrics import drawings, inception
from emu_jax.evaluate.question import Question
from tests.evaluate.benchmarks.editing import read
from tests.evaluate.people import HELD_OUT, people
from tests.evaluate.samples import VAL_IDS, write_sample


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
    with pytest.raises(UserError, match=r"the questions: has question 'v1_0', which .*captions_val2014.json lacks; "):
        real_images(tmp_path, [Question(id="v1_0")])
    for name in names[1:3]:
        (tmp_path / "val2014" / name).unlink()
    with pytest.raises(UserError, match=rf": no val2014/{names[1]} \(and 1 more\); coco_drawing expects there: "):
        real_images(tmp_path)
    assert len(BENCHMARK.read(tmp_path)) == 4  # prompts need no image


# ---------------------------------------------------------------- another group's captions

FIRST, SECOND = VAL_IDS[:2]
LISTED = [
    {"image_id": SECOND, "caption": "zwei Hüte"},
    {"image_id": FIRST, "caption": "a hat"},
    {"image_id": SECOND, "caption": "two hats"},
]


def test_another_list_of_captions(tmp_path):
    write_sample("coco_drawing", tmp_path)
    (tmp_path / LIST).write_text(json.dumps(LISTED), encoding="utf-8")
    questions = BENCHMARK.read(tmp_path)
    texts = {question.id: question.text for question in questions}
    assert texts == {str(SECOND): "zwei Hüte", str(FIRST): "a hat", f"{SECOND}-2": "two hats"}
    names = [path.name for path in real_images(tmp_path, questions)]
    assert names == [f"COCO_val2014_{image:012d}.jpg" for image in (SECOND, FIRST)]  # each once
    (tmp_path / LIST).write_text(json.dumps([*LISTED, {"image_id": "42", "caption": "a hat"}]))
    with pytest.raises(UserError, match=rf"{LIST}: \[3\].image_id is '42'; expected a whole number"):
        BENCHMARK.read(tmp_path)
    (tmp_path / LIST).write_text(json.dumps({"captions": LISTED}))
    with pytest.raises(UserError, match=f"{LIST}: the file is a JSON object; expected a JSON array"):
        BENCHMARK.read(tmp_path)


# ---------------------------------------------------------------- scores


@pytest.fixture
def compared(monkeypatch) -> list[dict]:
    """What the metrics would have compared."""
    calls: list[dict] = []

    def figures(emu, drawn, real, texts, **options):
        calls.append({"drawn": drawn, "real": real, "texts": texts} | options)
        return {}

    monkeypatch.setattr(drawings, "figures", figures)
    return calls


def _score(root, out, weights, *, safety=None):
    (out / "drawn").mkdir(parents=True, exist_ok=True)
    model = types.SimpleNamespace(decoder=types.SimpleNamespace(safety=safety))
    questions = BENCHMARK.read(root)
    predictions = {question.id: f"{question.id}.png" for question in questions}
    return BENCHMARK.score(questions, predictions, Scoring(root, out / "drawn", weights, model))


def test_the_list_of_captions_is_written_beside_scores(tmp_path, compared):
    """It asks another model for the same drawings."""
    write_sample("coco_drawing", tmp_path / "data")
    (tmp_path / "data" / LIST).write_text(json.dumps(LISTED), encoding="utf-8")
    _score(tmp_path / "data", tmp_path / "out", Weights())
    assert json.loads((tmp_path / "out" / LIST).read_text(encoding="utf-8")) == LISTED
    assert compared[0]["texts"] == [entry["caption"] for entry in LISTED] and compared[0]["fid_rule"] == "crop256"


def test_a_file_of_statistics_needs_no_image(tmp_path, compared, monkeypatch):
    monkeypatch.setattr(inception, "FEATURES", 3)
    np.savez(tmp_path / "real.npz", mu=np.zeros(3), sigma=np.eye(3))
    weights = Weights(inception=tmp_path / "weights.pth", fid="clean", fid_statistics=tmp_path / "real.npz")
    write_sample("coco_drawing", tmp_path / "data")
    _score(tmp_path / "data", tmp_path / "out", weights)
    assert len(compared[0]["real"]) == len(VAL_IDS)  # for the other distances
    images = tmp_path / "data" / "val2014"
    images.rename(tmp_path / "elsewhere")
    _score(tmp_path / "data", tmp_path / "out", weights)
    assert compared[1] == compared[0] | {"real": []} and compared[1]["fid_statistics"] == tmp_path / "real.npz"
    with pytest.raises(UserError, match="no val2014/COCO_val2014"):
        _score(tmp_path / "data", tmp_path / "out", Weights())


def test_black_images_are_not_scored(tmp_path, compared):
    write_sample("coco_drawing", tmp_path / "data")
    with pytest.raises(UserError, match=r"the model has a safety checker.*safety_checker=False, and draw into a new"):
        _score(tmp_path / "data", tmp_path / "out", Weights(), safety=object())
    assert not compared
