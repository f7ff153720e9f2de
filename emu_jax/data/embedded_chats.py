"""Chats about the embedded images: the quick start is tuned on those of training images and evaluated on the others.

"what is this?"                            "woman astronaut: dark skin tone"
"what skin tone does the person have?"     "dark"                       if the image shows one person with a skin tone
"yes or no, is this a firefighter"         "yes" or "no", equally often; the wrong name is another image's
"draw fairy: dark skin tone"               the image of that name

In training, the first and the last are asked in other words, too (`NAME_ASKS`, `DRAW_ASKS`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from emu_jax.data import fluent_emoji
from emu_jax.data.document import Document, Image, Text
from emu_jax.data.fluent_emoji import Example
from emu_jax.data.system_messages import IMAGE_SYSTEM

NAME_ASKS = ("what is this?", "what do you see?", "what does the image show?", "describe the image")
TONE_ASKS = "what skin tone does the person have?"
DRAW_ASKS = ("draw {}", "please draw {}", "draw an image of {}", "can you draw {}")
NAME = "fluent_emoji_chats"  # as config.data.source
QUESTIONS_NAME = "fluent_emoji_questions"
SEVERAL_IMAGES_SHARE = 0.3  # share of chats that show several images
DRAWN_SHARE = 0.2  # share of chats that ask for an image and show none
DRAWN_AT_END_SHARE = 0.1  # share of the other chats that ask for one at their end
MAX_IMAGES = 5  # of a chat
# Yes-or-no questions about an image on its own. Their answers are two tokens, and to compare an image with a name is
# harder to learn than to name it.
YES_OR_NO = 3
ROLE_WORDS = "user assistant"  # words from which [USER] and [ASSISTANT] are initialised


def has_one_tone(example: Example) -> bool:
    """Whether the caption is "role: tone": it has a tone, shows one person and has no detail after the tone."""
    return "," not in example.tone and example.caption == f"{example.role}: {example.tone}"


def kind_of_thing(example: Example) -> str:
    """What a yes-or-no question asks for: the role of a person, otherwise the caption."""
    return example.role if has_one_tone(example) else example.caption


def tone_answer(example: Example) -> str:
    """The answer to `TONE_ASKS`: "medium-dark" for "medium-dark skin tone"."""
    return example.tone.removesuffix(" skin tone")


@dataclasses.dataclass(frozen=True)
class Asked:
    """A question about one image, its answer, and its kind: name, tone or is-this."""

    question: str
    answer: str
    kind: str


def name(example: Example) -> Asked:
    """Asks what the image shows."""
    return Asked(NAME_ASKS[0], example.caption, "name")


def draw(example: Example) -> str:
    """Asks for an image of that name."""
    return DRAW_ASKS[0].format(example.caption)


def tone(example: Example) -> Asked | None:
    """Asks for the skin tone; None unless there is exactly one."""
    return Asked(TONE_ASKS, tone_answer(example), "tone") if has_one_tone(example) else None


def is_this(example: Example, things: Sequence[str], rng: np.random.Generator) -> Asked:
    """Asks, with equal probability, whether the image is what it is or whether it is one of `things`."""
    own = kind_of_thing(example)
    thing = own if rng.random() < 0.5 else things[int(rng.integers(len(things)))]
    return Asked(f"yes or no, is this a {thing}", "yes" if thing == own else "no", "is-this")


def questions(example: Example, things: Sequence[str], rng: np.random.Generator) -> list[Asked]:
    """All questions about one image."""
    asked = [name(example), tone(example), is_this(example, things, rng)]
    return [one for one in asked if one is not None]


class FluentChats:
    """A source (`sources.Source`) with one chat per image, drawn anew in every epoch.

    A chat asks either all questions about its image, in random order, or one question about it and one about each of
    some other images, as in a few-shot prompt; or it asks for its image, which is the answer.

    Attributes:
      examples: the images and what is known of them; a record is an index into them.
    """

    images_fingerprint = ""
    remark = ""

    def __init__(self, split: str, image_size: int):
        records = fluent_emoji.records(split)
        found = records.read(range(len(records)))
        self.examples = [fluent_emoji.read_example(record, image_size) for record in found]
        # The keys of the source fluent_emoji: a row that shows an image in both sources encodes it once.
        self._keys = [records.image_key(record, 0) for record in found]
        self.fingerprint = f"chats 3 {records.fingerprint}"

    @functools.cached_property
    def things(self) -> list[str]:
        """All that yes-or-no questions may ask for."""
        return sorted({kind_of_thing(example) for example in self.examples})

    def __len__(self) -> int:
        return len(self.examples)

    def read(self, indices: Sequence[int]) -> list[int]:
        return list(indices)  # a chat may show any of the images

    def key(self, index: int) -> str:
        return self._keys[index]

    def documents(self, record: int, rng: np.random.Generator) -> list[Document]:
        if rng.random() < DRAWN_SHARE:
            return [Document(tuple(self._drawn(record, rng)))]
        parts: list[Text | Image] = [Text(IMAGE_SYSTEM, "system")]
        several = rng.random() < SEVERAL_IMAGES_SHARE
        shown = [record, *rng.integers(len(self), size=rng.integers(1, MAX_IMAGES)).tolist()] if several else [record]
        for place in shown:
            example = self.examples[place]
            asked = questions(example, self.things, rng)
            if not several:
                asked += [is_this(example, self.things, rng) for _ in range(YES_OR_NO - 1)]
            parts.append(self.image(place))
            for number in rng.permutation(len(asked))[: 1 if several else None]:
                one = asked[number]
                words = NAME_ASKS[rng.integers(len(NAME_ASKS))] if one.kind == "name" else one.question
                parts += [Text(words, "user"), Text(one.answer, "assistant")]
        if rng.random() < DRAWN_AT_END_SHARE:
            parts += self._drawn(int(rng.integers(len(self))), rng)
        return [Document(tuple(parts))]

    def _drawn(self, place: int, rng: np.random.Generator) -> list[Text | Image]:
        """A request for an image, and the image; the empty text after it makes it the assistant's."""
        words = DRAW_ASKS[rng.integers(len(DRAW_ASKS))].format(self.examples[place].caption)
        return [Text(words, "user"), self.image(place), Text("", "assistant")]

    def image(self, place: int) -> Image:
        """The image of an example."""
        return Image(self.examples[place].pixels, self._keys[place])

    def texts(self) -> list[str]:
        rng = np.random.default_rng(0)
        asked = (one for example in self.examples for one in questions(example, self.things, rng))
        words = [IMAGE_SYSTEM, ROLE_WORDS, "yes no", *NAME_ASKS, *(ask.format("") for ask in DRAW_ASKS)]
        return [*words, *(text for one in asked for text in (one.question, one.answer))]


class FluentQuestions:
    """A source (`sources.Source`) with the questions of the chats for pretraining, as plain text around an image.

    The question comes first, so that what follows a document's first image is its caption. LLaMA has read text; a model
    from scratch has to read some, too: adapters cannot make a frozen language model say a word that it has never
    written, since the token head has the same row for every such word.
    """

    images_fingerprint = ""
    remark = ""

    def __init__(self, split: str, image_size: int):
        self._chats = FluentChats(split, image_size)
        self.fingerprint = f"questions 1 {self._chats.fingerprint}"

    def __len__(self) -> int:
        return len(self._chats)

    def read(self, indices: Sequence[int]) -> list[int]:
        return list(indices)

    def key(self, index: int) -> str:
        return self._chats.key(index)

    def documents(self, record: int, rng: np.random.Generator) -> list[Document]:
        asked = questions(self._chats.examples[record], self._chats.things, rng)
        one = asked[rng.integers(len(asked))]
        parts = (Text(one.question), self._chats.image(record), Text(one.answer))
        return [Document(parts, visual_weight=0.0)]  # the question does not tell what the image will be

    def texts(self) -> list[str]:
        return self._chats.texts()
