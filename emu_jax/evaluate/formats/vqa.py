"""The VQA server's format of questions, annotations and results.

questions    {"questions": [{"question_id", "image_id", "question"}]}
annotations  {"annotations": [{"question_id", "image_id", "question_type", "answer_type", "answers": [{"answer"}]}]}
results      [{"question_id": int, "answer": str}]

Images are COCO's of 2014 and 2015. `answers` are all that people gave, ten in most cases.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from emu_jax.evaluate.formats.captions import coco_names
from emu_jax.evaluate.formats.files import Entry, Files, check_same, unique
from emu_jax.evaluate.question import Question

# Split -> the questions' subtype and the images' folder.
SUBTYPES = {
    "train": ("train2014", "train2014"),
    "val": ("val2014", "val2014"),
    "test": ("test2015", "test2015"),
    "test-dev": ("test-dev2015", "test2015"),
}
UNANSWERED = ("test", "test-dev")


def reader(version: str, kind: str) -> Callable[[Files, str], list[Question]]:
    """Reads files whose names begin with `version`; the annotations' field `kind` becomes the questions' kind."""

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
                    answers=() if answer is None else given_answers(answer),
                    kind="" if answer is None else sys.intern(answer.text(kind)),
                )
            )
        return questions

    return read


def _document(files: Files, name: str, folder: str) -> Entry:
    return files.document(name, f"{folder}/{name}", f"annotations/{name}")


def given_answers(entry: Entry) -> tuple[str, ...]:
    """The answers that people gave."""
    if not (answers := entry.pluck("answers", "answer")):
        raise entry.wrong("answers", "at least one answer")
    return answers


def results(questions: Sequence[Question], answers: Mapping[str, Any]) -> list[dict]:
    """The VQA server's format of results."""
    return [{"question_id": int(question.id), "answer": answers[question.id]} for question in questions]
