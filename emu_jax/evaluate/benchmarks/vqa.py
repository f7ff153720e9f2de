"""Questions about images: VQAv2, OK-VQA and VizWiz. `answers` are all that people gave, ten in most cases.

VQAv2 and OK-VQA, used are
    questions    {"questions": [{"question_id", "image_id", "question"}]}
    annotations  {"annotations": [{"question_id", "image_id", "question_type", "answer_type", "answers": [{"answer"}]}]}
VQAv2: `v2_OpenEnded_mscoco_val2014_questions.json` and `v2_mscoco_val2014_annotations.json`, the same of train2014; of
test2015 and test-dev2015 only questions are published, both on the images of test2015. Kind: answer_type (yes/no,
number, other). The paper's scores are of test-dev, which only the server can give.
OK-VQA: `OpenEnded_mscoco_val2014_questions.json` and `mscoco_val2014_annotations.json`, the same of train2014. Kind:
question_type, the category of knowledge (its names are the file's: "one", …; unverified). Answers are "answer", the
stemmed form (beside it stands "raw_answer"; that scores are of the former is unverified).
VizWiz: `Annotations/val.json`, [{"image", "question", "answers": [{"answer"}], "answer_type"}], where test has only
the first two. Kind: answer_type (other, unanswerable, yes/no, number). Ids are the images' names, as one question is
asked of each.

Results: [{"question_id": int, "answer": str}] of the VQA server; [{"image", "answer"}] of VizWiz's.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence

from emu_jax.evaluate.benchmarks.benchmark import Benchmark, Prediction
from emu_jax.evaluate.benchmarks.captions import coco_names
from emu_jax.evaluate.benchmarks.files import Entry, Files, check_same, unique
from emu_jax.evaluate.question import Question

# Split -> the questions' subtype and the images' folder.
SUBTYPES = {
    "train": ("train2014", "train2014"),
    "val": ("val2014", "val2014"),
    "test": ("test2015", "test2015"),
    "test-dev": ("test-dev2015", "test2015"),
}
UNANSWERED = ("test", "test-dev")


def results(questions: Sequence[Question], predictions: Mapping[str, Prediction]) -> list[dict]:
    """The VQA server's format of results."""
    return [{"question_id": int(question.id), "answer": predictions[question.id]} for question in questions]


def _reader(version: str, kind: str) -> Callable[[Files, str], list[Question]]:
    """Of files whose names begin with `version`; `kind` is the annotations' field that becomes the questions' kind."""

    def read(files: Files, split: str) -> list[Question]:
        subtype, folder = SUBTYPES[split]
        asked = _document(files, f"{version}OpenEnded_mscoco_{subtype}_questions.json", "Questions")
        entries = unique(asked.entries("questions"), lambda entry: entry.whole("question_id"), "question_id")
        answered: dict[int, Entry] = {}
        if split not in UNANSWERED:
            document = _document(files, f"{version}mscoco_{subtype}_annotations.json", "Annotations")
            annotations = document.entries("annotations")
            answered = unique(annotations, lambda entry: entry.whole("question_id"), "question_id")
            check_same(entries, answered, "question", (asked.path, document.path))
        questions = []
        for key, entry in entries.items():
            image = entry.whole("image_id")
            answer = answered.get(key)
            if answer is not None and answer.whole("image_id") != image:
                raise answer.wrong("image_id", f"{image}, as {asked.path} has it for question {key}")
            questions.append(
                Question(
                    id=str(key),
                    images=(files.shown(*coco_names(folder, f"COCO_{folder}_{image:012d}.jpg")),),
                    text=entry.text("question"),
                    answers=() if answer is None else _answers(answer),
                    kind="" if answer is None else sys.intern(answer.text(kind)),
                )
            )
        return questions

    return read


def _document(files: Files, name: str, folder: str) -> Entry:
    return files.document(name, f"{folder}/{name}", f"annotations/{name}")


def _answers(entry: Entry) -> tuple[str, ...]:
    if not (answers := entry.pluck("answers", "answer")):
        raise entry.wrong("answers", "at least one answer")
    return answers


VQAV2 = Benchmark(
    name="vqav2",
    task="vqa",
    splits=("val", "test-dev", "test", "train"),
    split="val",
    shots="train",
    tree=(
        "v2_OpenEnded_mscoco_val2014_questions.json (and train2014, test-dev2015, test2015), here, in Questions/ or in "
        "annotations/",
        "v2_mscoco_val2014_annotations.json (and train2014), here, in Annotations/ or in annotations/",
        "val2014/COCO_val2014_000000262148.jpg … (and train2014/, test2015/), here or in images/",
    ),
    described="visualqa.org, page Download",
    reader=_reader("v2_", "answer_type"),
    submission=results,
)

OKVQA = Benchmark(
    name="okvqa",
    task="vqa",
    splits=("val", "train"),
    split="val",
    shots="train",
    tree=(
        "OpenEnded_mscoco_val2014_questions.json (and train2014), here, in Questions/ or in annotations/",
        "mscoco_val2014_annotations.json (and train2014), here, in Annotations/ or in annotations/",
        "val2014/COCO_val2014_000000297147.jpg … (and train2014/), here or in images/",
    ),
    described="okvqa.allenai.org, page Download; cocodataset.org, page Download (2014 images)",
    reader=_reader("", "question_type"),
    submission=results,
)


# ---------------------------------------------------------------- VizWiz


def _read_vizwiz(files: Files, split: str) -> list[Question]:
    records = files.records(f"Annotations/{split}.json", f"annotations/{split}.json", f"{split}.json")
    questions = []
    for name, entry in unique(records, lambda entry: entry.text("image"), "image").items():
        answers: tuple[str, ...] = ()
        kind = ""
        if split != "test":
            answers, kind = _answers(entry), entry.text("answer_type")
        questions.append(
            Question(
                id=name,
                images=(files.shown(f"{split}/{name}", f"images/{split}/{name}"),),
                text=entry.text("question"),
                answers=answers,
                kind=kind,
            )
        )
    return questions


def vizwiz_results(questions: Sequence[Question], predictions: Mapping[str, Prediction]) -> list[dict]:
    """VizWiz's format of results."""
    return [{"image": question.id, "answer": predictions[question.id]} for question in questions]


VIZWIZ = Benchmark(
    name="vizwiz",
    task="vqa",
    splits=("val", "test", "train"),
    split="val",
    shots="train",
    tree=(
        "Annotations/val.json (and train.json, test.json), or the same in annotations/ or here",
        "val/VizWiz_val_00000000.jpg … (and train/, test/), here or in images/",
    ),
    described="vizwiz.org, page Tasks and Datasets, Visual Question Answering",
    reader=_read_vizwiz,
    submission=vizwiz_results,
)
