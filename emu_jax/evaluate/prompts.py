"""Prompts: a question and few-shot examples -> what the model reads, how it decodes, what is kept of its output.

A prompt is a generator: it yields calls of the model, is sent each call's result, and returns the prediction.

    calls = vqa(question, images, examples, chat)
    call = next(calls)              ModelCall(parts, decoding)
    calls.send("a dog on a lawn")   the next call, or StopIteration with the prediction

Each has a form for the pretrained model and one for the instruction-tuned one (`chat`). Emu-I's prompts and decoding
settings are the reference's, from its evaluation code; the pretrained model's are one third party's copy. The form of
few-shot examples is published nowhere. Whatever is inferred is marked [I].
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import numpy as np

from emu_jax.data.embedded_chats import NAME_ASKS
from emu_jax.data.system_messages import IMAGE_SYSTEM, VIDEO_SYSTEM
from emu_jax.data.tokenizer import ASSISTANT, USER
from emu_jax.evaluate.question import Question
from emu_jax.storage import Path

END = "</s>"

# Beams, new tokens, minimal length and length penalty of the reference's inference code.
CAPTION = {"num_beams": 5, "max_new_tokens": 20, "min_length": 8, "length_penalty": -1.0}
SHORT = {"num_beams": 5, "max_new_tokens": 20, "min_length": 1, "length_penalty": -1.0}
LONG = {"num_beams": 5, "max_new_tokens": 128, "min_length": 1, "length_penalty": 1.0}
GREEDY = {"max_new_tokens": 24}  # for the embedded images

CAPTION_ASKS = " please provide an accurate and concise description of the given image."
CAPTION_BEGINS = " the image depicts a photo of"
ONE_PHRASE = (
    " based on the content of the {} and common sense, please provide an accurate answer consisting of only one word "
    "or phrase. "
)
ANSWER_BEGINS = " the answer is:"
BASE_CAPTION = " describing the image in detail. the image shows"

Part = str | Path | np.ndarray
Example = tuple[Question, Sequence[Part]]  # a question with answers, and its images; () for a text-only example


@dataclasses.dataclass(frozen=True)
class ModelCall:
    """One call of the model.

    Attributes:
      parts: texts and images, in order.
      decoding: keyword arguments of `Emu.generate_text`; the result is a text.
      candidates: if not (), continuations to score instead; the result is `CandidateScores`.
      draws: whether to draw an image instead; the result is its file name.
    """

    parts: tuple[Part, ...]
    decoding: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    candidates: tuple[str, ...] = ()
    draws: bool = False


Calls = Generator[ModelCall, Any, Any]
Prompt = Callable[[Question, Sequence[Part], Sequence[Example], bool], Calls]


# ---- what is kept of an answer ---------------------------------------------------------------------------------------


def caption_of(text: str) -> str:
    """The first sentence of the first line, in lower case, without its full stop (reference, COCO)."""
    return text.split("\n")[0].split(". ")[0].removesuffix(".").lower().strip()


def short_answer(text: str) -> str:
    """A word or phrase: up to the end of a line, sentence, quotation or clause, in lower case, without a leading
    "it is" or article (reference)."""
    for end in ("\n", ". ", '"', ", "):
        text = text.split(end)[0]
    text = text.strip().lower().removesuffix(".")
    for start in ("it is ", "it's ", "a ", "an ", "the "):
        text = text.removeprefix(start)
    return text


def shown_answer(question: Question) -> str:
    """The answer that a few-shot example shows: the most frequent one, the first of several [I]."""
    return max(question.answers, key=question.answers.count)


# ---- parts of prompts ------------------------------------------------------------------------------------------------


def join(*pieces: Part | Sequence[Part]) -> tuple[Part, ...]:
    """Pieces as one list of parts with adjacent texts merged: whether white space is significant depends on them."""
    flat: list[Part] = []
    for piece in pieces:
        for part in [piece] if isinstance(piece, str | Path | np.ndarray) else piece:
            if isinstance(part, str) and flat and isinstance(flat[-1], str):
                flat[-1] += part
            elif not isinstance(part, str) or part:
                flat.append(part)
    return tuple(flat)


def _turn(images: Sequence[Part], asked: str, begun: str = "", answer: str = "") -> tuple[Part, ...]:
    """` [USER]: images asked [ASSISTANT]: begun`, followed by the answer and its end token if there is an answer."""
    return join(f" {USER}: ", images, f"{asked} {ASSISTANT}:{begun}", f" {answer}{END}" if answer else "")


def chat_prompt(
    question: Question,
    images: Sequence[Part],
    examples: Sequence[Example],
    asks: Callable[[Question], str],
    begun: str = "",
) -> tuple[Part, ...]:
    """The system message, few-shot examples as earlier turns [I], and the question; `begun` starts every answer."""
    system = IMAGE_SYSTEM if question.video is None else VIDEO_SYSTEM
    turns = [_turn(shown, asks(example), begun, shown_answer(example)) for example, shown in examples]
    return join(system, *turns, _turn(images, asks(question), begun))


def one_phrase(question: Question) -> str:
    """Asks the instruction-tuned model for a word or phrase."""
    return ONE_PHRASE.format("image" if question.video is None else "video") + question.text  # "video" [I]


def _base_asks(question: Question) -> str:
    return f" based on the {'picture' if question.video is None else 'video'}, {question.text} short answer:"


def base_examples(examples: Sequence[Example], asks: Callable[[Question], str]) -> tuple[Part, ...]:
    """Few-shot examples of the pretrained model: images, question, answer and a full stop each [I]."""
    return join(*(join(shown, f"{asks(example)} {shown_answer(example)}. ") for example, shown in examples))


# ---- prompts that several benchmarks share ---------------------------------------------------------------------------


def caption(question: Question, images: Sequence[Part], examples: Sequence[Example], chat: bool) -> Calls:
    """A caption."""
    if chat:
        parts = chat_prompt(question, images, examples, lambda _: CAPTION_ASKS, CAPTION_BEGINS)
    else:
        parts = join(base_examples(examples, lambda _: BASE_CAPTION), images, BASE_CAPTION)
    return caption_of((yield ModelCall(parts, CAPTION)))


def vqa(question: Question, images: Sequence[Part], examples: Sequence[Example], chat: bool) -> Calls:
    """A short answer.

    The pretrained model is called twice, for a caption and then with text only, unless the prompt holds a video or
    examples' images.
    """
    if chat:
        parts = chat_prompt(question, images, examples, one_phrase, ANSWER_BEGINS)
        return short_answer((yield ModelCall(parts, SHORT)))
    before = base_examples(examples, _base_asks)
    if question.video is not None or any(shown for _, shown in examples):
        return short_answer((yield ModelCall(join(before, images, _base_asks(question)), SHORT)))
    described = caption_of((yield ModelCall(join(images, BASE_CAPTION), CAPTION)))
    return short_answer((yield ModelCall(join(before, f"a picture of {described}.{_base_asks(question)}"), SHORT)))


def embedded(question: Question, images: Sequence[Part], examples: Sequence[Example], chat: bool) -> Calls:
    """The name of an embedded image, or an answer about it, asked in few words for the quick start's small models."""

    def asks(question: Question) -> str:
        return f" {question.text}"

    if chat:
        parts = chat_prompt(question, images, examples, asks)
    elif question.text == NAME_ASKS[0]:  # in pretraining the name directly follows the image
        parts = join(*(join(shown, f" {shown_answer(example)} ") for example, shown in examples), images)
    else:
        parts = join(*(join(s, f"{asks(e)} {shown_answer(e)} ") for e, s in examples), images, asks(question))
    return (yield ModelCall(parts, GREEDY)).strip()
