"""Questions about the embedded images (`data/embedded_chats.py`); it needs no files.

Each image has at most one question about the skin tone and one yes-or-no question. The wrong names in yes-or-no
questions are drawn from a fixed seed.
"""

from __future__ import annotations

import functools

import numpy as np

from emu_jax.data import embedded_chats, fluent_emoji
from emu_jax.data.fluent_emoji import SIZE, examples
from emu_jax.evaluate.benchmarks.benchmark import Benchmark
from emu_jax.evaluate.embedded import DESCRIBED, HELD_OUT, SPLITS, TRAIN, exact_matches, make_question
from emu_jax.evaluate.formats.files import Files
from emu_jax.evaluate.prompts import embedded
from emu_jax.evaluate.question import Question

CHANCES = {"tone": 1 / 5, "is-this": 1 / 2}


@functools.cache
def _things() -> list[str]:
    """What a yes-or-no question may ask about: kinds of things that training showed."""
    return sorted({embedded_chats.kind_of_thing(example) for example in examples(TRAIN, SIZE)})


def _read(files: Files, split: str) -> list[Question]:
    rng = np.random.default_rng(fluent_emoji.SPLITS.index(split))
    questions: list[Question] = []
    for example in examples(split, SIZE):
        for asked in (embedded_chats.tone(example), embedded_chats.is_this(example, _things(), rng)):
            if asked is not None:
                questions.append(make_question(example, asked, f"/{asked.kind}"))
    return questions


BENCHMARK = Benchmark(
    name="fluent_qa",
    splits=SPLITS,
    split=HELD_OUT,
    few_shot_split=TRAIN,
    tree=(),
    described=DESCRIBED,
    reader=_read,
    prompt=embedded,
    metrics=lambda predictions, questions, _: exact_matches(predictions, questions, CHANCES),
)
