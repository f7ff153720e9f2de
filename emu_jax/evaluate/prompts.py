"""The paper's prompts: a question, with examples before it -> what the model reads, how it decodes, what is kept of it.

A benchmark names one of `PROMPTS`, a generator that yields steps, is sent what the model made of each, and returns the
prediction:

    asked = vqa(question, images, examples, chat)
    step = next(asked)              Step(parts, decoding)
    asked.send("a dog on a lawn")   the next step, or StopIteration with the prediction

Each knows the pretrained model's way of asking and the instruction-tuned one's (`chat`). Emu-I's prompts and decoding
settings are the reference's, those of its evaluation code; the pretrained model's are one third party's copy. What
examples look like is published nowhere. What is inferred is marked [I].
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from emu_jax.data.embedded_chats import NAME_ASKS
from emu_jax.data.system_messages import IMAGE_SYSTEM, VIDEO_SYSTEM
from emu_jax.data.tokenizer import ASSISTANT, USER
from emu_jax.evaluate.question import Question

END = "</s>"

# Beams, new tokens, minimal length and length penalty of the reference's inference code.
CAPTION = {"num_beams": 5, "max_new_tokens": 20, "min_length": 8, "length_penalty": -1.0}
SHORT = {"num_beams": 5, "max_new_tokens": 20, "min_length": 1, "length_penalty": -1.0}
LONG = {"num_beams": 5, "max_new_tokens": 128, "min_length": 1, "length_penalty": 1.0}
GREEDY = {"max_new_tokens": 24}  # of the embedded benchmarks

CAPTION_ASKS = " please provide an accurate and concise description of the given image."
CAPTION_BEGINS = " the image depicts a photo of"
ONE_PHRASE = (
    " based on the content of the {} and common sense, please provide an accurate answer consisting of only one word "
    "or phrase. "
)
ANSWER_BEGINS = " the answer is:"
BASE_CAPTION = " describing the image in detail. the image shows"

Part = str | Path | np.ndarray
Example = tuple[Question, Sequence[Part]]  # its images are () where it is text alone


@dataclasses.dataclass(frozen=True)
class Step:
    """One call of the model.

    Attributes:
      parts: texts and images, in order.
      decoding: keyword arguments of `Emu.generate_text`, which gives a text.
      candidates: where there are any, continuations to be scored instead: float32 [M], summed negative log p.
      draws: whether an image is drawn instead.
    """

    parts: tuple[Part, ...]
    decoding: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    candidates: tuple[str, ...] = ()
    draws: bool = False


Asked = Generator[Step, Any, Any]
Prompt = Callable[[Question, Sequence[Part], Sequence[Example], bool], Asked]


# ---- what is kept of an answer ---------------------------------------------------------------------------------------


def caption_of(text: str) -> str:
    """The first sentence of the first line, in lower case, without its full stop (reference, COCO)."""
    return text.split("\n")[0].split(". ")[0].removesuffix(".").lower().strip()


def short_answer(text: str) -> str:
    """A word or phrase: up to the end of a line, sentence, quotation or clause, in lower case, without "it is" and an
    article in front (reference)."""
    for end in ("\n", ". ", '"', ", "):
        text = text.split(end)[0]
    text = text.strip().lower().removesuffix(".")
    for start in ("it is ", "it's ", "a ", "an ", "the "):
        text = text.removeprefix(start)
    return text


def shown_answer(question: Question) -> str:
    """The answer that an example shows: the one given most often, of several the first [I]."""
    return max(question.answers, key=question.answers.count)


# ---- parts of prompts ------------------------------------------------------------------------------------------------


def _join(*pieces: Part | Sequence[Part]) -> tuple[Part, ...]:
    """Pieces as one list of parts in which no two texts are neighbours: whether white space counts depends on them."""
    flat: list[Part] = []
    for piece in pieces:
        for part in [piece] if isinstance(piece, str | Path | np.ndarray) else piece:
            if isinstance(part, str) and flat and isinstance(flat[-1], str):
                flat[-1] += part
            elif not isinstance(part, str) or part:
                flat.append(part)
    return tuple(flat)


def _turn(images: Sequence[Part], asked: str, begun: str = "", answer: str = "") -> tuple[Part, ...]:
    """` [USER]: images asked [ASSISTANT]: begun`, and the answer with its end where there is one."""
    return _join(f" {USER}: ", images, f"{asked} {ASSISTANT}:{begun}", f" {answer}{END}" if answer else "")


def _chat(
    question: Question,
    images: Sequence[Part],
    examples: Sequence[Example],
    asks: Callable[[Question], str],
    begun: str = "",
) -> tuple[Part, ...]:
    """The system message, examples as earlier turns [I], and the question."""
    system = IMAGE_SYSTEM if question.video is None else VIDEO_SYSTEM
    turns = [_turn(shown, asks(example), begun, shown_answer(example)) for example, shown in examples]
    return _join(system, *turns, _turn(images, asks(question), begun))


def _one_phrase(question: Question) -> str:
    return ONE_PHRASE.format("image" if question.video is None else "video") + question.text  # "video" [I]


def _base_asks(question: Question) -> str:
    return f" based on the {'picture' if question.video is None else 'video'}, {question.text} short answer:"


def _base_examples(examples: Sequence[Example], asks: Callable[[Question], str]) -> tuple[Part, ...]:
    """Each: images, question, answer and a full stop [I]."""
    return _join(*(_join(shown, f"{asks(example)} {shown_answer(example)}. ") for example, shown in examples))


# ---- prompts ---------------------------------------------------------------------------------------------------------


def caption(question: Question, images: Sequence[Part], examples: Sequence[Example], chat: bool) -> Asked:
    """COCO, NoCaps, Flickr30k -> a caption."""
    if chat:
        parts = _chat(question, images, examples, lambda _: CAPTION_ASKS, CAPTION_BEGINS)
    else:
        parts = _join(_base_examples(examples, lambda _: BASE_CAPTION), images, BASE_CAPTION)
    return caption_of((yield Step(parts, CAPTION)))


def vqa(question: Question, images: Sequence[Part], examples: Sequence[Example], chat: bool) -> Asked:
    """VQAv2, OK-VQA, MSVD-QA, MSRVTT-QA, NExT-QA -> a short answer.

    The pretrained model is asked in two steps, a caption and then text alone, unless it is shown images of examples,
    or a video.
    """
    if chat:
        return short_answer((yield Step(_chat(question, images, examples, _one_phrase, ANSWER_BEGINS), SHORT)))
    before = _base_examples(examples, _base_asks)
    if question.video is not None or any(shown for _, shown in examples):
        return short_answer((yield Step(_join(before, images, _base_asks(question)), SHORT)))
    described = caption_of((yield Step(_join(images, BASE_CAPTION), CAPTION)))
    return short_answer((yield Step(_join(before, f"a picture of {described}.{_base_asks(question)}"), SHORT)))


def vizwiz(question: Question, images: Sequence[Part], examples: Sequence[Example], chat: bool) -> Asked:
    """VizWiz -> a short answer, or "unanswerable" where the tuned model says that the answer is not known."""
    if chat:
        parts = _chat(question, images, (), lambda q: f"{_one_phrase(q)}, is the answer known?")
        known, unknown = yield Step(parts, candidates=(f"yes.{END}", f"no.{END}"))
        if unknown < known:
            return "unanswerable"
    return (yield from vqa(question, images, examples, chat))


def dialogue(question: Question, images: Sequence[Part], examples: Sequence[Example], chat: bool) -> Asked:
    """VisDial -> scores of the candidates, float32 [M]; the lowest is the best."""
    if chat:
        turns = [f" {USER}: {asked}? {ASSISTANT}: {answer}.{END}" for asked, answer in question.history]
        parts = _join(IMAGE_SYSTEM, f" {USER}: ", images, END, *turns, f" {USER}: {question.text}? {ASSISTANT}:")
    else:  # [I]
        turns = [f" question: {asked}? answer: {answer}." for asked, answer in question.history]
        parts = _join(images, *turns, f" question: {question.text}? answer:")
    return (yield Step(parts, candidates=question.candidates))


def open_ended(question: Question, images: Sequence[Part], examples: Sequence[Example], chat: bool) -> Asked:
    """MM-Vet -> an answer of any length, as it came."""
    if chat:
        parts = _chat(question, images, examples, lambda q: q.text)
    else:  # [I]
        parts = _join(_base_examples(examples, lambda q: f" {q.text}"), images, f" {question.text}")
    return (yield Step(parts, LONG)).strip()


def drawing(question: Question, images: Sequence[Part], examples: Sequence[Example], chat: bool) -> Asked:
    """COCO captions -> an image."""
    return (yield Step((question.text,), draws=True))


def embedded(question: Question, images: Sequence[Part], examples: Sequence[Example], chat: bool) -> Asked:
    """The embedded images -> a name or an answer, as the quick start's small models are asked: in few words."""

    def asks(question: Question) -> str:
        return f" {question.text}"

    if chat:
        parts = _chat(question, images, examples, asks)
    elif question.text == NAME_ASKS:  # pretraining gave the name right behind the image
        parts = _join(*(_join(shown, f" {shown_answer(example)} ") for example, shown in examples), images)
    else:
        parts = _join(*(_join(s, f"{asks(e)} {shown_answer(e)} ") for e, s in examples), images, asks(question))
    return (yield Step(parts, GREEDY)).strip()


PROMPTS: dict[str, Prompt] = {
    prompt.__name__: prompt for prompt in (caption, vqa, vizwiz, dialogue, open_ended, drawing, embedded)
}
