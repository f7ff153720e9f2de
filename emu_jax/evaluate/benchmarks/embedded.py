"""The embedded images as two benchmarks, which need no files: names of images, and questions about them.

A name is asked as the quick start's captions are; of every image at most one question about the skin tone and one
yes-or-no question are asked (`data/embedded_chats.py`). Which wrong names yes-or-no questions use is drawn from a fixed
seed. Examples come from training images.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np

from emu_jax.data import embedded_chats, fluent_emoji
from emu_jax.data.embedded_chats import Asked
from emu_jax.data.fluent_emoji import SIZE, SPLITS, Example
from emu_jax.evaluate.benchmarks.benchmark import Benchmark
from emu_jax.evaluate.benchmarks.files import Files
from emu_jax.evaluate.question import Question

HELD_OUT = "heldout_combinations"


def _question(example: Example, asked: Asked, suffix: str = "") -> Question:
    answers = (asked.answer,)
    return Question(example.key + suffix, (example.pixels,), text=asked.question, answers=answers, kind=asked.kind)


def _names(files: Files, split: str) -> list[Question]:
    return [_question(example, embedded_chats.name(example)) for example in fluent_emoji.examples(split, SIZE)]


@functools.cache
def _things() -> list[str]:
    """What a yes-or-no question may ask for: kinds of things that were seen in training."""
    return sorted({embedded_chats.kind_of_thing(example) for example in fluent_emoji.examples("train", SIZE)})


def _about(files: Files, split: str) -> list[Question]:
    rng = np.random.default_rng(SPLITS.index(split))
    questions: list[Question] = []
    for example in fluent_emoji.examples(split, SIZE):
        for asked in (embedded_chats.tone(example), embedded_chats.is_this(example, _things(), rng)):
            if asked is not None:
                questions.append(_question(example, asked, f"/{asked.kind}"))
    return questions


def _benchmark(name: str, reader: Callable[[Files, str], list[Question]]) -> Benchmark:
    splits: Sequence[str] = (HELD_OUT, *(split for split in SPLITS if split != HELD_OUT))
    return Benchmark(
        name=name,
        task="embedded",
        splits=tuple(splits),
        split=HELD_OUT,
        shots="train",
        tree=("nothing: its images are in the package",),
        described="emu_jax/data/fluent_emoji.py",
        reader=reader,
    )


FLUENT = _benchmark("fluent", _names)
FLUENT_QA = _benchmark("fluent_qa", _about)
