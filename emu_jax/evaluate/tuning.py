"""What instruction tuning did to the quick start's model: benchmarks of the embedded images, before and after, and
chats about held-out images.

In: the pretrained model and the tuned one. Out: `Tuning`, for the report.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from emu_jax.data import embedded_chats
from emu_jax.data.fluent_emoji import Example, examples
from emu_jax.evaluate.benchmark_runs import Request, evaluate
from emu_jax.evaluate.benchmarks.embedded import HELD_OUT
from emu_jax.evaluate.intervals import Figure
from emu_jax.generate.model import Emu
from emu_jax.generate.prompt import ImageLike

BENCHMARKS = ("fluent", "fluent_qa")
SHOTS = (0, 4)
SHOWN = ("exactly right", "CIDEr")  # in the report; scores.json beside the predictions has every figure
CHATS = 6  # shown in the report
ANSWER_TOKENS = 24


@dataclasses.dataclass(frozen=True)
class Said:
    """One turn of a chat: what was asked, said, and right."""

    question: str
    answer: str
    right: str


@dataclasses.dataclass(frozen=True)
class Conversation:
    """A chat about one image."""

    example: Example
    turns: list[Said]


@dataclasses.dataclass(frozen=True)
class Tuning:
    """`figures` by name ("pretrained, 4 examples: exactly right (tone)")."""

    figures: dict[str, Figure]
    conversations: list[Conversation]


def score(pretrained: Emu, tuned: Emu, folder: Path) -> Tuning:
    """Runs both models with 0 and 4 examples (predictions go to `folder`), and lets the tuned one chat."""
    figures: dict[str, Figure] = {}
    for name, emu in (("pretrained", pretrained), ("tuned", tuned)):
        for result in evaluate(emu, Request(BENCHMARKS, shots=SHOTS), folder / name):
            about = "names" if result.run.benchmark == "fluent" else "questions"
            where = f"{HELD_OUT}: {about}, {name}, {result.run.shots} examples"
            shown = {figure: value for figure, value in result.figures.items() if figure.startswith(SHOWN)}
            figures |= {f"{where}: {figure}": value for figure, value in shown.items()}
    return Tuning(figures, conversations(tuned))


def conversations(emu: Emu, count: int = CHATS) -> list[Conversation]:
    """Three turns about each of some held-out images of people; the image is shown in the first one."""
    rng = np.random.default_rng(0)
    size = emu.config.vision.image_size
    things = sorted({embedded_chats.kind_of_thing(example) for example in examples("train", size)})
    people = [example for example in examples(HELD_OUT, size) if embedded_chats.has_one_tone(example)][:count]
    found = []
    for example in people:
        chat = emu.chat()
        turns: list[Said] = []
        for asked in embedded_chats.questions(example, things, rng):
            message: list[str | ImageLike] = [asked.question] if turns else [example.pixels, asked.question]
            answer = chat.say(message, max_new_tokens=ANSWER_TOKENS).text.strip()
            turns.append(Said(asked.question, answer, asked.answer))
        found.append(Conversation(example, turns))
    return found
