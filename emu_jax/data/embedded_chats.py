"""Chats about the embedded images: the quick start tunes on training images', and is asked about the others.

"what is this?"                            "woman astronaut: dark skin tone"
"what skin tone does the person have?"     "dark"                       of images of one person with a skin tone
"is this a firefighter?"                   "yes" or "no", as often      a wrong one is another image's name
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from emu_jax.data import fluent_emoji
from emu_jax.data.document import Document, Image, Text
from emu_jax.data.fluent_emoji import Example
from emu_jax.data.system_messages import IMAGE_SYSTEM

NAME_ASKS = "what is this?"
TONE_ASKS = "what skin tone does the person have?"
NAME = "fluent_emoji_chats"  # as config.data.source
SEVERAL = 0.3  # share of chats that show several images
MOST = 5  # images of a chat
ROLES = "user assistant"  # words that [USER] and [ASSISTANT] begin as


def has_one_tone(example: Example) -> bool:
    """Whether the caption reads "role: tone": neither untoned nor of two people, nor with a detail behind the tone."""
    return "," not in example.tone and example.caption == f"{example.role}: {example.tone}"


def kind_of_thing(example: Example) -> str:
    """What a yes-or-no question asks for: the role of a person, else the caption."""
    return example.role if has_one_tone(example) else example.caption


def tone_answer(example: Example) -> str:
    """The tone alone: of "medium-dark skin tone", "medium-dark"."""
    return example.tone.removesuffix(" skin tone")


@dataclasses.dataclass(frozen=True)
class Asked:
    """A question about one image, its answer, and of which kind it is: name, tone or is-this."""

    question: str
    answer: str
    kind: str


def name(example: Example) -> Asked:
    """What it is."""
    return Asked(NAME_ASKS, example.caption, "name")


def tone(example: Example) -> Asked | None:
    """Which skin tone; None where there is not just one."""
    return Asked(TONE_ASKS, tone_answer(example), "tone") if has_one_tone(example) else None


def is_this(example: Example, things: Sequence[str], rng: np.random.Generator) -> Asked:
    """Whether it is its own kind of thing, or one of `things`, with equal probability."""
    own = kind_of_thing(example)
    thing = own if rng.random() < 0.5 else things[int(rng.integers(len(things)))]
    return Asked(f"yes or no, is this a {thing}", "yes" if thing == own else "no", "is-this")


def questions(example: Example, things: Sequence[str], rng: np.random.Generator) -> list[Asked]:
    """All that can be asked about one image."""
    asked = [name(example), tone(example), is_this(example, things, rng)]
    return [one for one in asked if one is not None]


class FluentChats:
    """A source of the pipeline: a chat about each image, drawn anew every time: all questions about it in some order;
    or one about it and one about each of some other images, as a few-shot prompt has them."""

    def __init__(self, split: str, image_size: int):
        self._examples = fluent_emoji.examples(split, image_size)
        self._split = split
        self.fingerprint = f"chats 1 {fluent_emoji.digest(split)}"

    @functools.cached_property
    def things(self) -> list[str]:
        """What yes-or-no questions may ask for."""
        return sorted({kind_of_thing(example) for example in self._examples})

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Any:
        return self._examples[index]

    def documents(self, index: int, rng: np.random.Generator) -> list[Document]:
        parts: list[Text | Image] = [Text(IMAGE_SYSTEM, "system")]
        several = rng.random() < SEVERAL
        shown = [index, *rng.integers(len(self), size=rng.integers(1, MOST)).tolist()] if several else [index]
        for place in shown:
            example = self._examples[place]
            asked = questions(example, self.things, rng)
            parts.append(Image(example.pixels, example.key))
            for number in rng.permutation(len(asked))[: 1 if several else None]:
                parts += [Text(asked[number].question, "user"), Text(asked[number].answer, "assistant")]
        return [Document(tuple(parts))]

    def texts(self) -> list[str]:
        rng = np.random.default_rng(0)
        asked = (one for example in self._examples for one in questions(example, self.things, rng))
        return [IMAGE_SYSTEM, ROLES, "yes no", *(text for one in asked for text in (one.question, one.answer))]
