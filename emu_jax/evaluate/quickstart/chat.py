"""The effect of instruction tuning on the quick start's model: benchmarks of the embedded images before and after, and
chats about held-out images."""

from __future__ import annotations

import dataclasses

import numpy as np

from emu_jax.data import embedded_chats
from emu_jax.data.fluent_emoji import Example, examples
from emu_jax.evaluate.benchmark_runs import EvaluationConfig, evaluate
from emu_jax.evaluate.embedded import HELD_OUT, TRAIN
from emu_jax.evaluate.intervals import Figure
from emu_jax.generate.model import Emu
from emu_jax.generate.prompt import ImageLike
from emu_jax.storage import Path

BENCHMARKS = ("fluent", "fluent_qa")
FEW_SHOT = (0, 4)  # numbers of examples
SHOWN = ("exactly right", "CIDEr")  # in the report; each run's own scores.json has every figure
CHATS = 6  # shown in the report
ANSWER_TOKENS = 24


@dataclasses.dataclass(frozen=True)
class Exchange:
    """One question of a chat, the model's answer and the right one."""

    question: str
    answer: str
    right: str


@dataclasses.dataclass(frozen=True)
class Conversation:
    """A chat about one image."""

    example: Example
    exchanges: list[Exchange]


@dataclasses.dataclass(frozen=True)
class Chats:
    """Figures by name ("heldout_combinations: names, tuned, 4 examples: exactly right (name)"), and conversations."""

    figures: dict[str, Figure]
    conversations: list[Conversation]


def score(pretrained: Emu, tuned: Emu, folder: Path) -> Chats:
    """Runs both models with 0 and 4 few-shot examples (predictions go to `folder`), and the tuned one's chats."""
    figures: dict[str, Figure] = {}
    for name, emu in (("pretrained", pretrained), ("tuned", tuned)):
        for result in evaluate(emu, EvaluationConfig(BENCHMARKS, few_shot=FEW_SHOT), folder / name):
            about = "names" if result.run.benchmark == "fluent" else "questions"
            where = f"{HELD_OUT}: {about}, {name}, {result.run.shots} examples"
            shown = {figure: value for figure, value in result.figures.items() if figure.startswith(SHOWN)}
            figures |= {f"{where}: {figure}": value for figure, value in shown.items()}
    return Chats(figures, conversations(tuned))


def conversations(emu: Emu, count: int = CHATS) -> list[Conversation]:
    """Three questions about each of some held-out images of people; the first message shows the image."""
    rng = np.random.default_rng(0)
    size = emu.config.vision.image_size
    things = sorted({embedded_chats.kind_of_thing(example) for example in examples(TRAIN, size)})
    people = [example for example in examples(HELD_OUT, size) if embedded_chats.has_one_tone(example)][:count]
    found = []
    for example in people:
        chat = emu.chat()
        exchanges: list[Exchange] = []
        for asked in embedded_chats.questions(example, things, rng):
            message: list[str | ImageLike] = [asked.question] if exchanges else [example.pixels, asked.question]
            answer = chat.say(message, max_new_tokens=ANSWER_TOKENS).text.strip()
            exchanges.append(Exchange(asked.question, answer, asked.answer))
        found.append(Conversation(example, exchanges))
    return found
