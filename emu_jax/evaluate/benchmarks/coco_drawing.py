"""Images drawn from COCO's captions: 30,000 captions of val2014, and the real images they are compared with.

`captions_val2014.json` in COCO's format of captions. Which 30,000 captions the paper took is not published. Here it is
one caption each of 30,000 images, both chosen by hashes of a fixed seed and the files' ids: everyone gets the same,
whatever the order of the file, and fewer captions are the first of more. `text` is the caption, `images` is empty: a
question shows nothing to the model.

`captions_to_draw.json`, a list of {"image_id", "caption"} as in COCO's results, replaces that choice by another
group's. Every run writes its own list beside its scores in the same format.
"""

from __future__ import annotations

import collections
import hashlib
import json
import pathlib
from collections.abc import Iterable, Sequence

from emu_jax.evaluate.benchmarks.benchmark import Benchmark, Scoring
from emu_jax.evaluate.formats.captions import captioned, coco_names
from emu_jax.evaluate.formats.files import Entry, Files, check_asked
from emu_jax.evaluate.intervals import Figure
from emu_jax.evaluate.metrics import drawings
from emu_jax.evaluate.prompts import Calls, Example, ModelCall, Part
from emu_jax.evaluate.question import Question
from emu_jax.storage import Path, replace_text

CAPTIONS = 30_000
SEED = 0
LIST = "captions_to_draw.json"


def _hash(*of: int) -> bytes:
    return hashlib.sha256("/".join(map(str, (SEED, *of))).encode()).digest()


def _document(files: Files) -> Entry:
    return files.document("captions_val2014.json", "annotations/captions_val2014.json")


def _read(files: Files, split: str) -> list[Question]:
    if (files.root / LIST).is_file():
        return _listed(files.records(LIST))
    chosen = []
    for image, captions in captioned(_document(files)):
        image_id = image.whole("id")
        caption = min(captions, key=lambda entry: _hash(image_id, entry.whole("id")))
        chosen.append((_hash(image_id), Question(id=str(image_id), text=caption.text("caption"))))
    chosen.sort(key=lambda pair: pair[0])
    return [question for _, question in chosen[:CAPTIONS]]


def _listed(entries: Sequence[Entry]) -> list[Question]:
    """A group's list, in its order; several captions of image 42 have the ids 42, 42-2, 42-3, …."""
    times: collections.Counter[int] = collections.Counter()
    questions = []
    for entry in entries:
        image = entry.whole("image_id")
        times[image] += 1
        again = f"-{times[image]}" if times[image] > 1 else ""
        questions.append(Question(id=f"{image}{again}", text=entry.text("caption")))
    return questions


def _image(question: Question) -> str:
    """The id of the image that a question's caption describes."""
    return question.id.partition("-")[0]


def real_images(root: Path, questions: Iterable[Question] | None = None) -> list[Path]:
    """The real images of val2014: all of them, as is usual for FID, or those of given questions, in their order.

    An image of several questions is returned once.

    Raises:
      UserError: one of them is missing.
    """
    files = BENCHMARK.files(root)
    document = _document(files)
    names = {str(entry.whole("id")): entry.text("file_name") for entry in document.entries("images")}
    ids = list(names if questions is None else dict.fromkeys(map(_image, questions)))
    check_asked(names, ids, "question", (document.path, pathlib.Path("the questions")))
    images = [files.shown(*coco_names("val2014", names[key])) for key in ids]
    files.check_shown()
    return images


def prompt(question: Question, images: Sequence[Part], examples: Sequence[Example], chat: bool) -> Calls:
    """The caption -> the file name of an image."""
    return (yield ModelCall((question.text,), draws=True))


def metrics(predictions: Sequence[str], questions: Sequence[Question], scoring: Scoring) -> dict[str, Figure]:
    """Fréchet distances from the questions' real images, and the CLIP score.

    With a file of the real images' statistics no image is needed; then FID is the only distance.

    Raises:
      UserError: the model has a safety checker, whose black images would be scored, or a file cannot be used.
    """
    drawings.check_unfiltered(scoring.emu, scoring.drawn)
    listed = [{"image_id": int(_image(question)), "caption": question.text} for question in questions]
    replace_text(scoring.drawn.parent / LIST, json.dumps(listed, ensure_ascii=False) + "\n")
    statistics = scoring.weights.fid_statistics
    needs_images = statistics is None or not statistics.is_file()
    has_images = any((scoring.root / folder).is_dir() for folder in coco_names("val2014", ""))
    return drawings.figures(
        scoring.emu,
        [scoring.drawn / name for name in predictions],
        real_images(scoring.root, questions) if needs_images or has_images else [],
        [question.text for question in questions],
        inception_weights=scoring.weights.inception,
        fid_rule=scoring.weights.fid,
        fid_statistics=statistics,
        clip=scoring.weights.clip,
        missing=scoring.missing,
    )


BENCHMARK = Benchmark(
    name="coco_drawing",
    splits=("val2014",),
    split="val2014",
    tree=(
        "captions_val2014.json, here or in annotations/",
        "val2014/COCO_val2014_000000000042.jpg …, here or in images/ (to compare with)",
        f"{LIST} (optional: other captions to draw)",
    ),
    described="cocodataset.org, page Download (2014 images and annotations)",
    reader=_read,
    prompt=prompt,
    predicts="image",
    metrics=metrics,
)
