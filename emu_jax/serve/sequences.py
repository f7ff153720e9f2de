"""What a person sends -> sequences of token ids and images that the model reads; nothing is computed here.

A conversation becomes, token by token, what training packs of the same turns (and what `Chat` reads); any other prompt
becomes what `Emu.generate_text` and `Emu.generate_image` read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence as Ordered
from typing import Any

import numpy as np

from emu_jax.data.document import Document, Image, Text
from emu_jax.data.sequence import tokenize_document
from emu_jax.data.tokenizer import ASSISTANT, IMG, USER
from emu_jax.errors import UserError
from emu_jax.generate.chat import NEW_TOKENS, Video, clean, default_system, read_message
from emu_jax.generate.model import Emu
from emu_jax.generate.prompt import ImageLike, Prompt, encode_prompts, read_image

ROW = 1 << 30  # a conversation is one row, which the context bounds

SYSTEM_ROLE, USER_ROLE, ASSISTANT_ROLE = "system", "user", "assistant"


@dataclasses.dataclass(frozen=True)
class Message:
    """One message of a conversation; `role` is system, user or assistant, and only users show images and videos."""

    role: str
    parts: tuple[str | ImageLike | Video, ...]


@dataclasses.dataclass(frozen=True)
class Sequence:
    """A prompt as the model reads it.

    Attributes:
      tokens: int32 [T]; <image> at visual positions.
      sources: int32 [T], image number * Q + query at every <image>, -1 elsewhere.
      images: uint8 [N, S, S, 3].
    """

    tokens: np.ndarray
    sources: np.ndarray
    images: np.ndarray

    def room(self, context: int, wanted: int | None) -> int:
        """How many new tokens there may be; None: as many as fit, at most 256.

        Raises:
          UserError: they do not fit the context.
        """
        left = context - len(self.tokens)
        count = min(NEW_TOKENS, max(left, 1)) if wanted is None else wanted
        if count > left:
            raise ContextError(
                f"the prompt has {len(self.tokens)} tokens; with {count} new ones it exceeds the model's context of "
                f"{context}; shorten it, show fewer images, or ask for fewer"
            )
        return count


class ContextError(UserError):
    """A prompt that is too long."""


def chats(model: Emu) -> bool:
    """Whether a model was tuned to chat."""
    return USER in model.tokenizer.added and ASSISTANT in model.tokenizer.added


def continuation(model: Emu, prompt: Prompt, *, draws: bool = False) -> Sequence:
    """Texts and images to be gone on from: with text, or (`draws`) with an image.

    Raises:
      UserError: an empty prompt or an unreadable image; ContextError: too long to be read at all.
    """
    config = model.config
    images = [part for part in prompt if not isinstance(part, str)]
    if draws and not any(part if isinstance(part, str) else True for part in prompt):
        raise UserError("the prompt is empty; say what to draw, or show an image")
    shown = iter([read_image(part, config.vision.image_size, "the prompt") for part in images])
    read = [part if isinstance(part, str) else next(shown) for part in prompt]
    batch = encode_prompts(
        [[clean(part, "the prompt", strip=False) if isinstance(part, str) else part for part in read]],
        model.tokenizer,
        queries=config.causal.queries,
        image_size=config.vision.image_size,
        context=ROW,
        new_tokens=0,
        suffix=IMG if draws else "",
    )
    kept = batch.valid[0]
    found = Sequence(batch.tokens[0][kept], batch.sources[0][kept], batch.images)
    found.room(config.llama.context, config.causal.queries if draws else 1)
    return found


def conversation(model: Emu, messages: Ordered[Message]) -> Sequence:
    """A conversation that ends with a user's message, to be answered.

    Messages of one role that follow each other are one. Without a system message the paper's stands in front, if the
    first turn shows images or videos.

    Raises:
      UserError: the model does not chat, roles out of order, an empty message, an unreadable image or video.
    """
    if not chats(model):
        raise UserError(
            "this model does not chat: its tokenizer has no [USER] and [ASSISTANT]; serve an instruction-tuned one "
            "(a run of configs/instruct.py, Emu-instruct.pt)"
        )
    turns: list[tuple[str, list[str | ImageLike | Video]]] = []
    for message in messages:
        if message.role not in (SYSTEM_ROLE, USER_ROLE, ASSISTANT_ROLE):
            raise UserError(f"role {message.role!r} is unknown; expected system, user or assistant")
        if turns and turns[-1][0] == message.role:
            turns[-1][1].extend(message.parts)
        else:
            turns.append((message.role, list(message.parts)))
    system: str | None = None
    if turns and turns[0][0] == SYSTEM_ROLE:
        system = _text(turns.pop(0)[1], "the system message")
    expected = [USER_ROLE if number % 2 == 0 else ASSISTANT_ROLE for number in range(len(turns))]
    if not turns or [role for role, _ in turns] != expected or turns[-1][0] != USER_ROLE:
        roles = ", ".join(role for role, _ in turns) or "none"
        raise UserError(
            f"the messages' roles are: {roles}; expected an optional system message first, then user and assistant in "
            "turn, a user's last"
        )
    parts: list[Text | Image] = []
    for number, (role, said) in enumerate(turns):
        where = f"message {number + 1}"
        if role == ASSISTANT_ROLE:
            parts.append(Text(_text(said, where), "assistant"))
            continue
        shown, videos = read_message(model, said, where)
        if number == 0 and (before := default_system(shown, videos) if system is None else system):
            parts.append(Text(before, "system"))
        parts += shown
    parts.append(Text("", "assistant"))
    pixels = [part.pixels for part in parts if isinstance(part, Image)]
    size, queries = model.config.vision.image_size, model.config.causal.queries
    rows: dict[str, Any] = {"row_tokens": ROW, "row_images": ROW}
    (found,) = tokenize_document(Document(tuple(parts)), model.tokenizer, queries=queries, **rows)
    slots = found.slots[:-1]  # without </s>: the answer is to come
    sources = np.where(slots >= 0, np.cumsum(slots >= 0) - 1, -1).astype(np.int32)
    images = np.stack(pixels) if pixels else np.zeros((0, size, size, 3), np.uint8)
    return Sequence(found.tokens[:-1].astype(np.int32), sources, images)


def _text(said: Ordered[str | ImageLike | Video], where: str) -> str:
    texts = [part for part in said if isinstance(part, str)]
    if len(texts) < len(said):
        raise UserError(f"{where}: only users show images and videos; expected text")
    return clean("".join(texts), where)
