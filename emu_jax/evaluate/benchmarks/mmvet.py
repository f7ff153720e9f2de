"""MM-Vet: two hundred open questions, each of which needs several capabilities; a language model scores the answers.

`mm-vet.json` of mm-vet.zip, used are
    {"v1_0": {"imagename": "v1_0.png", "question", "answer", "capability": ["ocr", "math"]}}
and images in `images/`. Kind: the capabilities in alphabetic order, joined by ", "; official scores are reported for
each capability and each combination. An answer may hold <AND> and <OR> between parts, for the scoring model.

Results: {"v1_0": answer} for the repository's `mm-vet_evaluator.py` or its online evaluator.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from emu_jax.evaluate.benchmarks.benchmark import Answer, Benchmark
from emu_jax.evaluate.formats.files import Files
from emu_jax.evaluate.prompts import LONG, Calls, Example, ModelCall, Part, base_examples, chat_prompt, join
from emu_jax.evaluate.question import Question

SEPARATOR = ", "  # between the capabilities in a kind


def _read(files: Files, split: str) -> list[Question]:
    document = files.document("mm-vet.json", keyed=True)
    questions = []
    for key in document.fields:  # duplicate names were refused when the file was read
        entry = document.entry(key)
        if not (capabilities := entry.texts("capability")):
            raise entry.wrong("capability", "at least one capability")
        questions.append(
            Question(
                id=key,
                images=(files.shown(f"images/{entry.text('imagename')}"),),
                text=entry.text("question"),
                answers=(entry.text("answer"),),
                kind=SEPARATOR.join(sorted(set(capabilities))),
            )
        )
    return questions


def prompt(question: Question, images: Sequence[Part], examples: Sequence[Example], chat: bool) -> Calls:
    """An answer of any length, unchanged."""
    if chat:
        parts = chat_prompt(question, images, examples, lambda q: q.text)
    else:  # [I]
        parts = join(base_examples(examples, lambda q: f" {q.text}"), images, f" {question.text}")
    return (yield ModelCall(parts, LONG)).strip()


def results(questions: Sequence[Question], answers: Mapping[str, Answer]) -> dict[str, Answer]:
    """The evaluator's input."""
    return {question.id: answers[question.id] for question in questions}


BENCHMARK = Benchmark(
    name="mmvet",
    splits=("test",),
    split="test",
    tree=("mm-vet.json", "images/v1_0.png …"),
    described="yuweihao/MM-Vet on GitHub, README (mm-vet.zip)",
    reader=_read,
    prompt=prompt,
    submission=results,
)
