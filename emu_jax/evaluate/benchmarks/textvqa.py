"""TextVQA: questions whose answers are written in the image, ten people's answers each.

`TextVQA_0.5.1_val.json` (and train, test), used are
    {"data": [{"question_id": 34602, "image_id": "003a8ae2ef43b901", "question", "answers": [str]}]}
where test has no answers. (Fields: from code that reads the files; the files themselves: unverified.) The images of
train and val are in one folder, `train_images/`. There are no kinds. Results for EvalAI, as for VQA:
[{"question_id": int, "answer": str}]. (MMF's files also have image_id and pred_source; that the server does not need
them: unverified.)

Most published scores are for val. The prompt is the reference's for short answers [I], since the reference has no
TextVQA. Words that an OCR system found are in files of their own, which some models' prompts show and this one does
not. An answer ends at the first full stop or comma before a space, as the reference keeps it: "dr. pepper" becomes
"dr".
"""

from __future__ import annotations

from emu_jax.evaluate.benchmarks.benchmark import Benchmark
from emu_jax.evaluate.formats.files import Entry, Files, unique
from emu_jax.evaluate.formats.vqa import results
from emu_jax.evaluate.metrics.vqa import figures, textvqa_accuracy
from emu_jax.evaluate.prompts import vqa
from emu_jax.evaluate.question import Question

FOLDERS = {"val": "train_images", "train": "train_images", "test": "test_images"}
PEOPLE = 10


def _read(files: Files, split: str) -> list[Question]:
    document = files.document(f"TextVQA_0.5.1_{split}.json")
    questions = []
    for key, entry in unique(document.entries("data"), lambda entry: entry.whole("question_id"), "question_id").items():
        name = f"{FOLDERS[split]}/{entry.text('image_id')}.jpg"
        questions.append(
            Question(
                id=str(key),
                images=(files.shown(name, f"images/{name}"),),
                text=entry.text("question"),
                answers=() if split == "test" else _answers(entry),
            )
        )
    return questions


def _answers(entry: Entry) -> tuple[str, ...]:
    if len(answers := entry.texts("answers")) != PEOPLE:
        raise entry.wrong("answers", f"{PEOPLE} answers")
    return answers


BENCHMARK = Benchmark(
    name="textvqa",
    splits=tuple(FOLDERS),
    split="val",
    few_shot_split="train",
    tree=(
        "TextVQA_0.5.1_val.json (and train, test)",
        "train_images/003a8ae2ef43b901.jpg … (train and val) and test_images/ (test), here or in images/",
    ),
    described="textvqa.org, page Dataset",
    reader=_read,
    prompt=vqa,
    metrics=lambda predictions, questions, _: figures(predictions, questions, textvqa_accuracy),
    submission=results,
)
