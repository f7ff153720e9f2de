"""MM-Vet: two hundred open questions, each of which needs several capabilities; a language model scores the answers.

`mm-vet.json` of mm-vet.zip, used are
    {"v1_0": {"imagename": "v1_0.png", "question", "answer", "capability": ["ocr", "math"]}}
and images in `images/`. Kind: the capabilities in alphabetic order, joined by ", "; the official scores are of each
capability and of each combination. An answer may hold <AND> and <OR> between parts, for the scoring model.

Results: {"v1_0": answer} for the repository's `mm-vet_evaluator.py` or its online evaluator.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from emu_jax.evaluate.benchmarks.benchmark import Benchmark, Prediction
from emu_jax.evaluate.benchmarks.files import Files
from emu_jax.evaluate.question import Question

SEPARATOR = ", "  # between the capabilities in a kind


def _read(files: Files, split: str) -> list[Question]:
    document = files.document("mm-vet.json", keyed=True)
    questions = []
    for key in document.fields:  # names that stand twice were refused when the file was read
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


def results(questions: Sequence[Question], predictions: Mapping[str, Prediction]) -> dict[str, Prediction]:
    """What the evaluator reads."""
    return {question.id: predictions[question.id] for question in questions}


MMVET = Benchmark(
    name="mmvet",
    task="open",
    splits=("test",),
    split="test",
    shots="",
    tree=("mm-vet.json", "images/v1_0.png …"),
    described="yuweihao/MM-Vet on GitHub, README (mm-vet.zip)",
    reader=_read,
    submission=results,
)
