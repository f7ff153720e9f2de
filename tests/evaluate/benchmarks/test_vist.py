"""VIST: stories, their prompts, and the similarity of drawn and real photos."""

import types
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from emu_jax.data.clip_scores import ClipScorer
from emu_jax.data.system_messages import IMAGE_SYSTEM
from emu_jax.errors import UserError
from emu_jax.evaluate.benchmarks import vist, vist_drawing
from emu_jax.evaluate.benchmarks.benchmark import Scoring, Weights
from emu_jax.evaluate.metrics.drawings import clip_similarity
from emu_jax.evaluate.prompts import CAPTION
from emu_jax.evaluate.question import Question
from emu_jax.generate.prompt import read_image
from tests.data.test_clip_scores import clip  # noqa: F401  (a fixture)
from tests.evaluate.benchmarks.editing import edit, read, refused
from tests.evaluate.people import HELD_OUT, TRAIN, people
from tests.evaluate.samples import write_sample

PHOTOS = [str(4602435 + n) for n in range(5)]  # of split val
ROLES = [person.role for person in (people(HELD_OUT) + people(TRAIN))[:5]]
MET, WAS = ([f"{begun} a {role} ." for role in ROLES] for begun in ("we met", "there was"))


def _images(root, photos=PHOTOS):
    return tuple(root / "images" / f"{photo}.jpg" for photo in photos)


def test_the_last_sentence_is_asked_for(tmp_path):
    write_sample("vist", tmp_path)
    found = read("vist", tmp_path, "val")
    assert list(found) == ["46024", "46025"]
    assert found["46025"] == Question(
        id="46025", images=_images(tmp_path, PHOTOS[:4]), text="\n".join(WAS[:4]), answers=(WAS[4],)
    )


def test_the_last_photo_is_drawn(tmp_path):
    write_sample("vist_drawing", tmp_path)
    questions, captions = (read("vist_drawing", tmp_path, split) for split in ("", "val-captions"))
    id = f"46024/{PHOTOS[-1]}"
    assert questions[id] == Question(id=id, images=_images(tmp_path, PHOTOS[:4]), text="\n".join(MET))
    assert captions[id] == Question(id=id, text="\n".join(MET))
    assert questions.keys() == captions.keys() and len(questions) == 2


def test_photos_stand_by_their_orders_not_by_the_files(tmp_path):
    write_sample("vist", tmp_path)
    before = read("vist", tmp_path, "val")
    edit(tmp_path / "sis" / "val.story-in-sequence.json", lambda document: document["annotations"].reverse())
    assert read("vist", tmp_path, "val") == before


def test_prompts_are_the_story_in_its_order():
    images = [np.full((2, 2, 3), n, np.uint8) for n in range(4)]
    story = [part for pair in zip(MET, images, strict=False) for part in pair]
    asked = Question("1", text="\n".join(MET[:4]))
    for chat in (False, True):
        calls = vist.prompt(asked, images, (), chat)
        call = next(calls)
        expected = [IMAGE_SYSTEM + " [USER]: " + MET[0], *story[1:], f"{vist.ASKS} [ASSISTANT]:"] if chat else story
        assert list(call.parts) == expected and call.decoding == CAPTION and not call.draws
        with pytest.raises(StopIteration) as end:
            calls.send("We all Went home. Then")
        assert end.value.value == "we all went home"
    drawn = Question("1/2", text="\n".join(MET))
    for shown, expected in ((images, [*story, MET[4]]), ([], [" ".join(MET)])):
        call = next(vist_drawing.prompt(drawn, shown, (), False))
        assert list(call.parts) == expected and call.draws


# ---------------------------------------------------------------- photos that are not there


@pytest.mark.parametrize(
    ("name", "split"), [("vist", "val"), ("vist_drawing", "val"), ("vist_drawing", "val-captions")]
)
def test_stories_with_missing_photos_are_left_out_if_they_are_named(tmp_path, name, split):
    write_sample(name, tmp_path)
    path = tmp_path / "sis" / "val.story-in-sequence.json"
    edit(path, lambda document: document["annotations"][7][0].update(photo_flickr_id="99"))  # of the second story
    message = refused(name, tmp_path, split)
    assert message.startswith(f"ROOT: no images/99.jpg; {name} expects there: ")
    assert "missing_photos.txt (optional: ids of photos that cannot be had, one a line" in message
    (tmp_path / "missing_photos.txt").write_text("7\n99\n")
    assert [id.partition("/")[0] for id in read(name, tmp_path, split)] == ["46024"]
    (tmp_path / "missing_photos.txt").write_text("99.jpg")
    assert refused(name, tmp_path, split) == "missing_photos.txt: holds '99.jpg'; expected ids of photos, one a line"


def test_the_photo_to_compare_with_must_be_there(tmp_path):
    write_sample("vist_drawing", tmp_path)
    (tmp_path / "images" / f"{PHOTOS[-1]}.jpg").unlink()
    assert refused("vist_drawing", tmp_path).startswith(f"ROOT: no images/{PHOTOS[-1]}.jpg; ")
    assert len(read("vist", tmp_path, "val")) == 2  # which does not show it
    (tmp_path / "images" / "val").mkdir()
    PIL.Image.new("RGB", (8, 8)).save(tmp_path / "images" / "val" / f"{PHOTOS[-1]}.png")
    assert len(read("vist_drawing", tmp_path)) == 2


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda a: a[3].append({}), "annotations[3] is a list of 2; expected a list of one JSON object"),
        (
            lambda a: a[3][0].update(story_id="../7"),
            "annotations[3][0].story_id is '../7'; expected a number as a text",
        ),
        (lambda a: a[3][0].update(photo_flickr_id=7), "annotations[3][0].photo_flickr_id is 7; expected a text"),
        (lambda a: a[3][0].update(text=" "), "annotations[3][0].text is ' '; expected a sentence"),
        (
            lambda a: a[3][0].update(worker_arranged_photo_order=1),
            "annotations[3][0].worker_arranged_photo_order is 1; expected 0 to 4, each once in a story",
        ),
        (lambda a: a.pop(), "story 46025 has 4 sentences; expected 5"),
    ],
)
def test_wrong_files(tmp_path, change, expected):
    write_sample("vist", tmp_path)
    edit(tmp_path / "sis" / "val.story-in-sequence.json", lambda document: change(document["annotations"]))
    assert refused("vist", tmp_path, "val") == f"sis/val.story-in-sequence.json: {expected}"


# ---------------------------------------------------------------- scores


def test_similarity_is_that_of_gills_program(clip):  # noqa: F811
    """Its lines, in compute_clip_similarity_vist.py: features of both images, each of length 1, and their product."""
    import torch
    import transformers

    model = transformers.CLIPModel.from_pretrained(clip)
    drawn, real = (
        [np.random.default_rng(n).integers(0, 256, (8, 8, 3), np.uint8) for n in of] for of in ((1, 2, 3), (4, 5, 6))
    )
    expected = []
    for ours, theirs in zip(drawn, real, strict=True):
        pixels = (np.stack([ours, theirs]).transpose(0, 3, 1, 2) / 255 - 0.5) / 0.25
        with torch.inference_mode():
            seen = model.get_image_features(pixel_values=torch.tensor(pixels, dtype=torch.float32)).pooler_output
        expected.append(((seen[0] / seen[0].norm()) @ (seen[1] / seen[1].norm())).item())
    figure = clip_similarity(ClipScorer(clip), drawn, real, np.array([0, 1, 2]))
    print(f"{figure.value} expected {np.mean(expected)}")
    assert figure.value == pytest.approx(np.mean(expected), abs=1e-6) and figure.count == 3
    assert figure.interval[0] < figure.value < figure.interval[1]
    one = clip_similarity(ClipScorer(clip), drawn, real, np.array([7, 7, 7]))
    assert one.interval == (one.value, one.value)  # three drawings of one photo
    with pytest.raises(UserError, match="3 drawn and 2 real images; expected as many of both"):
        clip_similarity(ClipScorer(clip), drawn, real[:2], np.arange(3))


def test_drawings_are_compared_with_the_last_photos(tmp_path, clip):  # noqa: F811
    write_sample("vist_drawing", tmp_path / "data")
    questions = vist_drawing.BENCHMARK.read(tmp_path / "data")
    predictions = {question.id: f"{question.id}.png" for question in questions}
    model = types.SimpleNamespace(decoder=None)

    def score(**weights):
        scoring = Scoring(tmp_path / "data", tmp_path / "out" / "drawn", Weights(**weights), model)
        return vist_drawing.BENCHMARK.score(questions, predictions, scoring)

    for question in questions:  # drawn perfectly
        path = tmp_path / "out" / "drawn" / predictions[question.id]
        path.parent.mkdir(parents=True)
        PIL.Image.fromarray(read_image(_images(tmp_path / "data")[-1], 128, "")).save(path)
    ((name, figure),) = score(clip=Path(clip)).items()
    assert name.startswith("CLIP similarity, ") and figure.value == pytest.approx(1.0, abs=1e-6) and figure.count == 2
    with pytest.raises(UserError, match=r"compared with photos by CLIP; give the folder of one \(--clip\)"):
        score()
    model.decoder = types.SimpleNamespace(safety=object())
    with pytest.raises(UserError, match="the model has a safety checker"):
        score(clip=Path(clip))
