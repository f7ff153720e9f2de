"""COCO's format of captions, Karpathy's splits of captions, and COCO's format of results.

COCO's, used are
    {"images": [{"id", "file_name"}], "annotations": [{"id", "image_id", "caption"}]}
Karpathy's ("Deep Visual-Semantic Alignments"), used are
    {"images": [{"split", "sentences": [{"raw"}]}]}, and what names the image
with the splits train and restval, which together are `train` here, val and test.
Results: [{"image_id": int, "caption": str}].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from emu_jax.errors import UserError
from emu_jax.evaluate.formats.files import Entry, more, unique
from emu_jax.evaluate.question import Question

KARPATHY = {"train": ("train", "restval"), "val": ("val",), "test": ("test",)}


def coco_names(folder: str, file: str) -> tuple[str, str]:
    """Where COCO's images are stored: beside the annotations, or under images/."""
    return f"{folder}/{file}", f"images/{folder}/{file}"


def captioned(document: Entry) -> list[tuple[Entry, list[Entry]]]:
    """COCO's format of captions -> its images, each with its annotations in the file's order.

    Raises:
      UserError: two images or two annotations share an id, an image has no caption, or a caption no image.
    """
    images = unique(document.entries("images"), lambda entry: entry.whole("id"), "id")
    found: dict[int, list[Entry]] = {key: [] for key in images}
    for annotation in unique(document.entries("annotations"), lambda entry: entry.whole("id"), "id").values():
        if (key := annotation.whole("image_id")) not in found:
            raise annotation.wrong("image_id", "the id of one of the file's images")
        found[key].append(annotation)
    if bare := [key for key, captions in found.items() if not captions]:
        raise UserError(
            f"{document.path}: no caption of image {bare[0]}{more(bare)}; expected some of every image of the file"
        )
    return [(images[key], captions) for key, captions in found.items()]


def texts(captions: Sequence[Entry]) -> tuple[str, ...]:
    """The captions of COCO's annotations."""
    return tuple(caption.text("caption") for caption in captions)


def karpathy(document: Entry, split: str) -> list[Entry]:
    """A split's images of Karpathy's format."""
    known = [name for names in KARPATHY.values() for name in names]
    chosen = []
    for entry in document.entries("images"):
        if (name := entry.text("split")) not in known:
            raise entry.wrong("split", f"one of {', '.join(known)}")
        if name in KARPATHY[split]:
            chosen.append(entry)
    return chosen


def sentences(entry: Entry) -> tuple[str, ...]:
    """The captions of one of Karpathy's images."""
    if not (captions := tuple(sentence.text("raw") for sentence in entry.entries("sentences"))):
        raise entry.wrong("sentences", "at least one caption")
    return captions


def results(questions: Sequence[Question], answers: Mapping[str, Any]) -> list[dict]:
    """COCO's format of results."""
    return [{"image_id": int(question.id), "caption": answers[question.id]} for question in questions]
