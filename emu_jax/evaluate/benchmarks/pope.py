"""POPE: whether an object is in an image, three that are and three that are not, asked about 500 images of COCO.

`coco_pope_random.json` (and popular, adversarial), JSON lines despite its name,
    {"question_id": 1, "image": "COCO_val2014_000000310196.jpg", "text", "label": "yes" or "no"}
The three differ in how the objects were chosen that are not in the image: at random, the most frequent ones, or those
that occur most often beside the objects that are. Kind: the file. Ids: the file and the question's number in it.

Split `all` reads the three, as published tables do. No server takes results. The official rule decides whether an
answer says yes (`metrics/yes_no.py`); it sees what the prompt keeps of the model's words.

The prompt is the reference's for short answers [I]: POPE prescribes none, and the reference has no POPE.
"""

from __future__ import annotations

from emu_jax.evaluate.benchmarks.benchmark import Benchmark
from emu_jax.evaluate.formats.captions import coco_names
from emu_jax.evaluate.formats.files import Files, unique
from emu_jax.evaluate.metrics.yes_no import NO, YES, figures
from emu_jax.evaluate.prompts import vqa
from emu_jax.evaluate.question import Question

KINDS = ("random", "popular", "adversarial")
ALL = "all"


def _read(files: Files, split: str) -> list[Question]:
    return [question for kind in (KINDS if split == ALL else (split,)) for question in _read_file(files, kind)]


def _read_file(files: Files, kind: str) -> list[Question]:
    name = f"coco_pope_{kind}.json"
    lines = files.lines(name, f"coco/{name}", f"output/coco/{name}")
    questions = []
    for key, entry in unique(lines, lambda entry: entry.whole("question_id"), "question_id").items():
        if (label := entry.text("label")) not in (YES, NO):
            raise entry.wrong("label", f"{YES!r} or {NO!r}")
        questions.append(
            Question(
                id=f"{kind}/{key}",
                images=(files.shown(*coco_names("val2014", entry.text("image"))),),
                text=entry.text("text"),
                answers=(label,),
                kind=kind,
            )
        )
    return questions


BENCHMARK = Benchmark(
    name="pope",
    splits=(ALL, *KINDS),
    split=ALL,
    tree=(
        "coco_pope_random.json, coco_pope_popular.json, coco_pope_adversarial.json, here, in coco/ or in output/coco/",
        "val2014/COCO_val2014_000000310196.jpg …, here or in images/",
    ),
    described="RUCAIBox/POPE on GitHub, folder output/coco; cocodataset.org, page Download (2014 Val images)",
    reader=_read,
    prompt=vqa,
    metrics=lambda predictions, questions, _: figures(predictions, questions),
)
