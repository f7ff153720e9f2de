"""SEED-Bench: questions about images with four options each, answered by the likelihood of the options' texts.

`SEED-Bench.json`, used are
    {"questions": [question], "question_type": {"Scene Understanding": 1, …}}
    question: {"question_id": "101669", "data_id", "data_type": "image", "question_type_id": 1 to 9, "question",
               "choice_a" to "choice_d", "answer": "A" to "D"}
and the images in `SEED-Bench-image/`, whose names are the `data_id` without a suffix. A question's kind is the name of
its type. The answer is one of the four texts, each scored after the question alone: the model never sees the options
beside one another.

The official program (eval.py) takes the lowest loss. In its default interface, InstructBLIP on FLAN-T5
(model/instruct_blip_interface.py, lavis/models/blip2_models/modeling_t5.py), that is the sum over an option's tokens;
the interface for Hugging Face's InstructBLIP and those of SEED-Bench-2 take the mean. So the first figures are by sum.
FLAN-T5's sum ends with the end token, which is left out here. The program reports the accuracy of each type and of all
questions together; the average of the types is not official.

Questions about videos (types 10 to 12) are left out. Their videos are those of three other sets, of which two are asked
about by segments of videos of up to an hour. The layout of the frames that were published later (`v1_video`) is
described nowhere in the repository.

Results: a line {"question_id", "prediction": "A"} each, as eval.py writes them for the leaderboard.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from emu_jax.evaluate import intervals
from emu_jax.evaluate.benchmarks.benchmark import Answer, Benchmark, Scoring
from emu_jax.evaluate.formats.files import Entry, Files, unique
from emu_jax.evaluate.intervals import Figure
from emu_jax.evaluate.metrics.figures import by_kind, check
from emu_jax.evaluate.multiple_choice import BY_TEXT, by_every_rule, chances, checked_letter, is_right, letter_of
from emu_jax.evaluate.prompts import Calls, Example, ModelCall, Part, chat_prompt, join
from emu_jax.evaluate.question import Question

FILE = "SEED-Bench.json"
CHOICES = ("choice_a", "choice_b", "choice_c", "choice_d")
IMAGE_TYPES = range(1, 10)


def _read(files: Files, split: str) -> list[Question]:
    document = files.document(FILE)
    names = _type_names(document.entry("question_type"))
    entries = unique(document.entries("questions"), lambda entry: entry.text("question_id"), "question_id")
    questions = []
    for key, entry in entries.items():
        kind = entry.whole("question_type_id")
        if kind not in names:
            raise entry.wrong("question_type_id", "one of the numbers in question_type")
        if kind not in IMAGE_TYPES:
            continue
        options = tuple(entry.text(name) for name in CHOICES)
        questions.append(
            Question(
                id=key,
                images=(files.shown(f"SEED-Bench-image/{entry.text('data_id')}"),),
                text=entry.text("question"),
                answers=(checked_letter(entry, "answer", options),),
                kind=names[kind],
                candidates=options,
            )
        )
    return questions


def _type_names(types: Entry) -> dict[int, str]:
    """Number -> name."""
    names: dict[int, str] = {}
    for name in types.fields:
        if (other := names.setdefault(types.whole(name), name)) != name:
            raise types.wrong(name, f"another number than that of {other!r}")
    return names


def prompt(question: Question, images: Sequence[Part], examples: Sequence[Example], chat: bool) -> Calls:
    """Scores of the four texts by every rule. The pretrained model's prompt is that of the official interface."""
    if chat:
        parts = chat_prompt(question, images, (), lambda q: q.text)
    else:
        parts = join(images, f" Question: {question.text}\nAnswer:")
    return by_every_rule((yield ModelCall(parts, candidates=question.candidates)))


def metrics(predictions: Sequence[Any], questions: Sequence[Question], scoring: Scoring) -> dict[str, Figure]:
    """Accuracy over all questions and by type, by each rule."""
    check(predictions, questions)
    found: dict[str, Figure] = {}
    for rule, name in BY_TEXT.items():
        hits = [is_right(scores, question, rule) for scores, question in zip(predictions, questions, strict=True)]
        found |= by_kind(f"accuracy {name}", hits, questions, intervals.share, chances(questions))
    return found


def results(questions: Sequence[Question], answers: Mapping[str, Answer]) -> str:
    """The leaderboard's format."""
    rows = ({"question_id": q.id, "prediction": letter_of(answers[q.id])} for q in questions)
    return "".join(json.dumps(row) + "\n" for row in rows)


BENCHMARK = Benchmark(
    name="seedbench",
    splits=("image",),
    split="image",
    tree=(FILE, "SEED-Bench-image/1454426_2591111986 … (SEED-Bench-image.zip)"),
    described="AILab-CVC/SEED-Bench on GitHub, DATASET.md (the part about SEED-Bench-1)",
    reader=_read,
    prompt=prompt,
    predicts="scores",
    metrics=metrics,
    submission=results,
    rule="sum",
)
