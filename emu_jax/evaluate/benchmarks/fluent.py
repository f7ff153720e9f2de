"""Names of the embedded images, asked for in the quick start's form; it needs no files."""

from __future__ import annotations

from collections.abc import Sequence

from emu_jax.data import embedded_chats
from emu_jax.data.fluent_emoji import SIZE, examples
from emu_jax.evaluate.benchmarks.benchmark import Benchmark, Scoring
from emu_jax.evaluate.embedded import DESCRIBED, HELD_OUT, SPLITS, TRAIN, exact_matches, make_question
from emu_jax.evaluate.formats.files import Files
from emu_jax.evaluate.intervals import Figure
from emu_jax.evaluate.metrics import captions
from emu_jax.evaluate.metrics.figures import attempt
from emu_jax.evaluate.prompts import embedded
from emu_jax.evaluate.question import Question


def _read(files: Files, split: str) -> list[Question]:
    return [make_question(example, embedded_chats.name(example)) for example in examples(split, SIZE)]


def metrics(predictions: Sequence[str], questions: Sequence[Question], scoring: Scoring) -> dict[str, Figure]:
    """Exact matches, and caption scores where Java is installed: the quick start must not need it."""

    def scores() -> dict[str, Figure]:
        return captions.figures(predictions, questions, scoring.missing)

    return exact_matches(predictions, questions, {}) | attempt("caption scores", scores, scoring.missing)


BENCHMARK = Benchmark(
    name="fluent",
    splits=SPLITS,
    split=HELD_OUT,
    few_shot_split=TRAIN,
    tree=(),
    described=DESCRIBED,
    reader=_read,
    prompt=embedded,
    metrics=metrics,
)
