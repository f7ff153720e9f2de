"""GenEval: 553 prompts about objects, their number, colours and positions, with four drawings each.

`evaluation_metadata.jsonl`, used are, a line a prompt,
    {"tag", "prompt", "include": [{"class", "count", "color"?, "position"?: [relation, index]}], "exclude": [the same]}
Kind: the tag, one of single_object, two_object, counting, colors, position and color_attr.

Drawings have the layout that the official `evaluate_images.py` reads, so `drawn` is its IMAGE_FOLDER:
    00000/metadata.jsonl            the prompt's line
    00000/samples/0000.png … 0003.png

That program finds objects with Mask2Former and names colours with CLIP. Its rules are here, too, for objects that
another program found. `detections.jsonl` beside `drawn` has a line an image,
    {"image": "00000/samples/0000.png",
     "objects": [{"class": "bench", "score": 0.98, "box": [left, top, right, bottom], "color": "red"}]}
with boxes in pixels, GenEval's names of classes, and colours of the objects whose colour is asked for. The rules are
those of its default options, and figures those of `summary_scores.py`. NumPy leaves it open which of two equal scores
comes first there; here it is the one that is later in the file.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from jaxtyping import Float32

from emu_jax.errors import nearest
from emu_jax.evaluate import intervals
from emu_jax.evaluate.benchmarks.benchmark import Benchmark, Scoring
from emu_jax.evaluate.formats.drawn_images import read_by_image
from emu_jax.evaluate.formats.files import Entry, Files
from emu_jax.evaluate.intervals import Figure
from emu_jax.evaluate.metrics.drawings import check_unfiltered
from emu_jax.evaluate.prompts import Calls, Example, ModelCall, Part
from emu_jax.evaluate.question import Question
from emu_jax.storage import Path, replace_text

SAMPLES = 4  # drawings of a prompt
METADATA, DETECTIONS = "evaluation_metadata.jsonl", "detections.jsonl"
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")

# The official program's default options.
CONFIDENCE, COUNTING_CONFIDENCE = 0.3, 0.9  # a detection's score must be above
MOST = 16  # objects of a class in an image
OVERLAP = 0.1  # share of the two objects' sizes by which their centres must differ at least
FURTHEST = 1e6  # pixels; larger coordinates are a mistake


# ---------------------------------------------------------------- prompts


@dataclasses.dataclass(frozen=True)
class Clause:
    """Objects that an image must have (include) or must not have (exclude).

    Attributes:
      name: the class.
      count: how many: at least so many are expected, or fewer than so many.
      color: the colour of all `count` objects; "" for any.
      relation: their position relative to the objects of another clause; "" for any.
      target: the number of that clause, an earlier one.
    """

    name: str
    count: int
    color: str = ""
    relation: str = ""
    target: int = 0


@dataclasses.dataclass(frozen=True)
class Scene:
    """What one prompt asks for; `fields` is its line."""

    tag: str
    prompt: str
    include: tuple[Clause, ...]
    exclude: tuple[Clause, ...]
    fields: Mapping


def read_scenes(files: Files) -> list[Scene]:
    """The prompts, in the file's order."""
    scenes = []
    for line in files.lines(METADATA, f"prompts/{METADATA}"):
        include, exclude = (
            tuple(_clause(entry, number) for number, entry in enumerate(line.entries(name) if name in line else ()))
            for name in ("include", "exclude")
        )
        scenes.append(Scene(line.text("tag"), line.text("prompt"), include, exclude, line.fields))
    return scenes


def _clause(entry: Entry, number: int) -> Clause:
    if (count := entry.whole("count")) < 1:
        raise entry.wrong("count", "1 or more")
    clause = Clause(entry.text("class"), count)
    if "color" in entry:
        clause = dataclasses.replace(clause, color=_color(entry))
    if "position" in entry:
        match entry.fields["position"]:
            case [str(relation), int(target)] if relation in RELATIONS and 0 <= target < number:
                return dataclasses.replace(clause, relation=relation, target=int(target))
        raise entry.wrong("position", f"one of {', '.join(RELATIONS)}, and the number of an earlier clause")
    return clause


def _color(entry: Entry) -> str:
    if (color := entry.text("color")) not in COLORS:
        raise entry.wrong("color", f"one of {', '.join(COLORS)}")
    return color


def _read(files: Files, split: str) -> list[Question]:
    return [
        Question(id=f"{number:05d}/samples/{sample:04d}", text=scene.prompt, kind=scene.tag)
        for number, scene in enumerate(read_scenes(files))
        for sample in range(SAMPLES)
    ]


def prompt(question: Question, images: Sequence[Part], examples: Sequence[Example], chat: bool) -> Calls:
    """The prompt as it is -> the file name of an image."""
    return (yield ModelCall((question.text,), draws=True))


# ---------------------------------------------------------------- detections


@dataclasses.dataclass(frozen=True)
class Detection:
    """An object that was found.

    Attributes:
      box: left, top, right, bottom; float32, as in the official program.
      entry: its place in the file, which may have its colour.
    """

    name: str
    score: np.float32
    box: Float32[np.ndarray, " 4"]
    entry: Entry

    @property
    def color(self) -> str:
        if "color" not in self.entry:
            raise self.entry.wrong("color", f"one of {', '.join(COLORS)}, because the prompt asks for a colour")
        return _color(self.entry)


def _detections(entry: Entry, classes: Sequence[str]) -> Iterator[Detection]:
    """The objects of an image's line; a class that is none of `classes` is a mistake, such as COCO's "mouse"."""
    for item in entry.entries("objects"):
        if (name := item.text("class")) not in classes:
            raise item.wrong("class", f"a class of {METADATA}; did you mean {nearest(name, classes)}?")
        if not 0 <= (score := item.number("score")) <= 1:
            raise item.wrong("score", "a number from 0 to 1")
        box = item.numbers("box")
        if len(box) != 4 or max(map(abs, box)) > FURTHEST:
            raise item.wrong("box", "left, top, right and bottom in pixels")
        yield Detection(name, np.float32(score), np.array(box, np.float32), item)


def kept(detections: Sequence[Detection], tag: str) -> dict[str, list[Detection]]:
    """By class the detections that count for a prompt of this tag, the surest first."""
    threshold = np.float32(COUNTING_CONFIDENCE if tag == "counting" else CONFIDENCE)
    found: dict[str, list[Detection]] = {}
    for detection in sorted(reversed(detections), key=lambda detection: -detection.score):
        if detection.score > threshold and len(found.get(detection.name, ())) < MOST:
            found.setdefault(detection.name, []).append(detection)
    return found


def relations(box: Float32[np.ndarray, " 4"], target: Float32[np.ndarray, " 4"]) -> set[str]:
    """The position of a box relative to another one; {} where they overlap too much, two where it is diagonal."""
    corners = np.stack([box, target]).reshape(2, 2, 2)  # box, corner, x and y
    centers, sizes = corners.mean(1), np.abs(corners[:, 1] - corners[:, 0])  # [2, 2]
    offset = centers[0] - centers[1]
    beyond = np.maximum(np.abs(offset) - np.float32(OVERLAP) * (sizes[0] + sizes[1]), 0) * np.sign(offset)
    if np.all(np.abs(beyond) < 1e-3):
        return set()
    x, y = beyond / np.linalg.norm(offset)
    signs = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {relation for relation, holds in signs.items() if holds}


def is_correct(scene: Scene, detections: Sequence[Detection]) -> bool:
    """Whether an image has all that its prompt asks for.

    Of a class, only the `count` surest objects are looked at for their colour and position. Every one of them must have
    the position relative to each of the target's.
    """
    found = kept(detections, scene.tag)
    matched: list[list[Detection] | None] = []
    for clause in scene.include:
        objects = found.get(clause.name, [])[: clause.count]
        right = len(objects) == clause.count
        if right and clause.color:
            right = all([detection.color == clause.color for detection in objects])  # a list: every colour is checked
        if right and clause.relation:
            targets = matched[clause.target]
            right = targets is not None and all(
                clause.relation in relations(detection.box, target.box) for detection in objects for target in targets
            )
        matched.append(objects if right else None)
    return None not in matched and all(len(found.get(not_.name, ())) < not_.count for not_ in scene.exclude)


# ---------------------------------------------------------------- scores


def metrics(predictions: Sequence[str], questions: Sequence[Question], scoring: Scoring) -> dict[str, Figure]:
    """Writes the prompts' lines into the drawings' folders; figures where there are detections.

    Raises:
      UserError: the model has a safety checker, or the detections are not as described above.
    """
    check_unfiltered(scoring.emu, scoring.drawn)
    scenes = read_scenes(BENCHMARK.files(scoring.root))
    numbers = [int(question.id.partition("/")[0]) for question in questions]
    for number in dict.fromkeys(numbers):
        _write_line(scoring.drawn / f"{number:05d}" / "metadata.jsonl", scenes[number])
    path = scoring.drawn.parent / DETECTIONS
    if not path.is_file():
        return {}
    entries = read_by_image(path, predictions)
    classes = sorted({clause.name for scene in scenes for clause in (*scene.include, *scene.exclude)})
    right = [
        is_correct(scenes[number], list(_detections(entries[name], classes)))
        for number, name in zip(numbers, predictions, strict=True)
    ]
    return figures(right, [scenes[number] for number in numbers])


def _write_line(path: Path, scene: Scene) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps(scene.fields))


def figures(right: Sequence[bool], scenes: Sequence[Scene]) -> dict[str, Figure]:
    """The overall score, which is the mean of the tags' shares of right images, the tags', and shares of all images and
    of prompts with one right image or more. Intervals draw whole prompts.

    Args:
      right: whether each image is right.
      scenes: what each image was drawn from; images of equal prompts are of one prompt.
    """
    hits, tags = np.asarray(right, bool), np.array([scene.tag for scene in scenes])
    numbers: dict[str, int] = {}
    groups = np.array([numbers.setdefault(json.dumps(scene.fields), len(numbers)) for scene in scenes])
    found = {"GenEval": intervals.mean_of_kinds(hits, tags, groups)}
    for tag in dict.fromkeys(tags.tolist()):
        found[f"GenEval ({tag})"] = intervals.share(hits[tags == tag], groups=groups[tags == tag])
    found["correct images"] = intervals.share(hits, groups=groups)
    found["prompts with a correct image"] = intervals.share(np.bincount(groups, hits) > 0)
    return found


BENCHMARK = Benchmark(
    name="geneval",
    splits=("test",),
    split="test",
    tree=(f"{METADATA}, here or in prompts/",),
    described="djghosh13/geneval on GitHub, folder prompts",
    reader=_read,
    prompt=prompt,
    predicts="image",
    metrics=metrics,
)
