"""The effect of instruction tuning on the quick start's model: benchmarks of the embedded images before and after, and
chats about held-out images."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from PIL.Image import Image as PILImage

from emu_jax.data import embedded_chats
from emu_jax.data.fluent_emoji import Example, examples
from emu_jax.data.system_messages import IMAGE_SYSTEM
from emu_jax.data.tokenizer import ASSISTANT, USER
from emu_jax.evaluate.benchmark_runs import EvaluationConfig, evaluate
from emu_jax.evaluate.embedded import HELD_OUT, TRAIN
from emu_jax.evaluate.intervals import Figure, share
from emu_jax.evaluate.quickstart.captions import in_batches
from emu_jax.evaluate.quickstart.drawings import SETTINGS
from emu_jax.generate.model import Emu
from emu_jax.generate.prompt import ImageLike
from emu_jax.generate.text import GeneratedText
from emu_jax.storage import Path

BENCHMARKS = ("fluent", "fluent_qa")
FEW_SHOT = (0, 4)  # numbers of examples
SHOWN = ("exactly right", "CIDEr")  # in the report; each run's own scores.json has every figure
CHATS = 6  # shown in the report
ANSWER_TOKENS = 24


@dataclasses.dataclass(frozen=True)
class Exchange:
    """One question of a chat, the model's answer and the right one; or one that asks for an image, `drawn`."""

    question: str
    answer: str
    right: str
    drawn: PILImage | None = None


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
    """Runs both models with 0 and 4 few-shot examples (predictions go to `folder`), and the tuned one's chats.

    If the pretrained model draws, the tuned one draws with its decoder.
    """
    figures: dict[str, Figure] = {}
    decoder, mesh = pretrained.decoder, tuned.mesh
    tuned = Emu(tuned.config, tuned.params, tuned.statistics, tuned.tokenizer, decoder, mesh)
    for name, emu in (("pretrained", pretrained), ("tuned", tuned)):
        for result in evaluate(emu, EvaluationConfig(BENCHMARKS, few_shot=FEW_SHOT), folder / name):
            about = "names" if result.run.benchmark == "fluent" else "questions"
            where = f"{HELD_OUT}: {about}, {name}, {result.run.shots} examples"
            shown = {figure: value for figure, value in result.figures.items() if figure.startswith(SHOWN)}
            figures |= {f"{where}: {figure}": value for figure, value in shown.items()}
    if tuned.config.learn_image_token:
        figures |= begun_images(tuned)
    return Chats(figures, conversations(tuned))


def begun_images(emu: Emu) -> dict[str, Figure]:
    """How often the model begins an image where it is asked to draw one, and where it is asked what an image shows."""
    pool = examples(HELD_OUT, emu.config.vision.image_size)

    def begins(prompt: Callable[[Example], list[str | ImageLike]], about: str) -> Figure:
        """Chance is unknown: an untrained model begins no image."""

        def answer(some: Sequence[Example]) -> list[GeneratedText]:
            return emu.generate_text([prompt(example) for example in some], max_new_tokens=ANSWER_TOKENS)

        return share([one.ended_by == "image" for one in in_batches(answer, pool, about)])

    asks, named = embedded_chats.draw, embedded_chats.NAME_ASKS[0]
    where = f"{HELD_OUT}: an image begins by itself where the chat asks"
    return {
        f"{where} for one": begins(lambda e: [f"{USER}: {asks(e)} {ASSISTANT}:"], "asked to draw"),
        f"{where} what one shows": begins(
            lambda e: [f"{IMAGE_SYSTEM} {USER}:", e.pixels, f"{named} {ASSISTANT}:"], "asked for names"
        ),
    }


def conversations(emu: Emu, count: int = CHATS) -> list[Conversation]:
    """Three questions about each of some held-out images of people; the first message shows the image.

    A model that draws is asked for another one's image at the end.
    """
    rng = np.random.default_rng(0)
    size = emu.config.vision.image_size
    things = sorted({embedded_chats.kind_of_thing(example) for example in examples(TRAIN, size)})
    people = [example for example in examples(HELD_OUT, size) if embedded_chats.has_one_tone(example)][:count]
    found = []
    for number, example in enumerate(people):
        chat = emu.chat()
        exchanges: list[Exchange] = []
        for asked in embedded_chats.questions(example, things, rng):
            message: list[str | ImageLike] = [asked.question] if exchanges else [example.pixels, asked.question]
            answer = chat.say(message, max_new_tokens=ANSWER_TOKENS).text.strip()
            exchanges.append(Exchange(asked.question, answer, asked.answer))
        if emu.decoder is not None and emu.config.learn_image_token:
            asked = embedded_chats.draw(people[(number + 1) % len(people)])
            said = chat.say(asked, max_new_tokens=ANSWER_TOKENS)
            drawn = chat.draw(**SETTINGS).image if said.ended_by == "image" else None
            exchanges.append(Exchange(asked, said.text.strip(), "", drawn))
        found.append(Conversation(example, exchanges))
    return found
