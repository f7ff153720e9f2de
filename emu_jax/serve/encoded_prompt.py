"""Prompts and conversations of a request -> token ids and images for the model; no computation on the device.

A conversation becomes the tokens that training packs from the same turns, which are also those of `Chat`. Any other
prompt becomes the tokens of `Emu.generate_text` and `Emu.generate_image`.

All text of a request is text: what spells the name of a special token ("</s>", "[IMG]") never becomes that token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int, UInt8

from emu_jax.data.document import Image, Text
from emu_jax.data.tokenizer import ASSISTANT, IMG, USER, PlainText
from emu_jax.errors import UserError
from emu_jax.generate.messages import (
    DEFAULT_NEW_TOKENS,
    Video,
    add_text,
    clean,
    default_system,
    join_texts,
    read_message,
    tokenize_conversation,
)
from emu_jax.generate.model import Emu
from emu_jax.generate.prompt import UNBOUNDED, ImageLike, Prompt, encode_prompts, read_image

SYSTEM_ROLE, USER_ROLE, ASSISTANT_ROLE = "system", "user", "assistant"


@dataclasses.dataclass(frozen=True)
class Message:
    """One message of a conversation; `role` is system, user or assistant.

    Users show images and videos; an assistant's images are those that it drew.
    """

    role: str
    parts: tuple[str | ImageLike | Video, ...]


@dataclasses.dataclass(frozen=True)
class EncodedPrompt:
    """The model's input for one request.

    Attributes:
      tokens: int32 ids; <image> at visual positions.
      embedding_index: int32; at every <image>, its row among the images' embeddings [N*Q, D]; -1 elsewhere.
      images: uint8 or float32 pixels of the model's size.
    """

    tokens: Int[np.ndarray, " T"]
    embedding_index: Int[np.ndarray, " T"]
    images: UInt8[np.ndarray, "N S S 3"]

    def max_new_tokens(self, context: int, wanted: int | None) -> int:
        """Maximum number of new tokens: `wanted`, or 256 for None, but no more than fit the context.

        Raises:
          ContextError: none fits.
        """
        self.check_room(context, 1)
        return min(DEFAULT_NEW_TOKENS if wanted is None else wanted, context - len(self.tokens))

    def check_room(self, context: int, count: int) -> None:
        """Raises ContextError unless `count` new tokens fit the context."""
        if len(self.tokens) + count > context:
            raise ContextError(
                f"the prompt has {len(self.tokens)} tokens; with {count} new ones it exceeds the model's context of "
                f"{context}; shorten it, or show fewer images"
            )


class ContextError(UserError):
    """A prompt that is too long for the context."""


def can_chat(model: Emu) -> bool:
    """Whether a model was tuned to chat."""
    return USER in model.tokenizer.added and ASSISTANT in model.tokenizer.added


def encode_continuation(model: Emu, prompt: Prompt, *, draws: bool = False) -> EncodedPrompt:
    """A prompt that is continued with text, or with an image if `draws`.

    Raises:
      UserError: an empty prompt or an unreadable image. ContextError: the prompt leaves no room for a continuation.
    """
    config = model.config
    if draws and not any(part if isinstance(part, str) else True for part in prompt):
        raise UserError("the prompt is empty; say what to draw, or show an image")
    images = [part for part in prompt if not isinstance(part, str)]
    shown = iter([read_image(part, config.vision.image_size, "the prompt") for part in images])
    batch = encode_prompts(
        [
            [
                PlainText(clean(part, "the prompt", strip=False)) if isinstance(part, str) else next(shown)
                for part in prompt
            ]
        ],
        model.tokenizer,
        queries=config.causal.queries,
        image_size=config.vision.image_size,
        context=UNBOUNDED,
        new_tokens=0,
        suffix=IMG if draws else "",
    )
    kept = batch.valid[0]
    encoded = EncodedPrompt(batch.tokens[0][kept], batch.embedding_index[0][kept], batch.images)
    encoded.check_room(config.llama.context, config.causal.queries if draws else 1)
    return encoded


def encode_conversation(model: Emu, messages: Sequence[Message], *, drawn_after: str | None = None) -> EncodedPrompt:
    """A conversation that ends with a user's message, ready for the answer.

    With `drawn_after`, the answer's text so far, it is ready for the image that the model began there.

    Consecutive messages of one role are joined, their texts by line breaks. Without a system message, the paper's is
    used if the first turn shows images or videos.

    Raises:
      UserError: the model does not chat, roles out of order, an empty message, an unreadable image or video.
    """
    if not can_chat(model):
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
    size = model.config.vision.image_size
    parts: list[Text | Image] = []
    for number, (role, content) in enumerate(turns):
        where = f"message {number + 1}"
        if role == ASSISTANT_ROLE:
            parts += _answer(content, size, where)
            continue
        shown, videos = read_message(content, size, where)
        if number == 0 and (first := default_system(shown, videos) if system is None else system):
            parts.append(Text(first, "system"))
        parts += shown
    parts.append(Text(drawn_after or "", "assistant"))
    pixels = [part.pixels for part in parts if isinstance(part, Image)]
    tokens, index = tokenize_conversation(parts, model.tokenizer, model.config.causal.queries)
    images = np.stack(pixels) if pixels else np.zeros((0, size, size, 3), np.uint8)
    tokens, index = tokens[:-1], index[:-1]  # without </s>: the answer is still missing
    if drawn_after is not None:
        tokens, index = np.append(tokens, np.int32(model.tokenizer.img_id)), np.append(index, np.int32(-1))
    return EncodedPrompt(tokens, index, images)


def _answer(content: Sequence[str | ImageLike | Video], size: int, where: str) -> list[Text | Image]:
    """An assistant's message as parts. The text after an image makes it part of the answer."""
    parts: list[Text | Image] = []
    for part in content:
        if isinstance(part, Video):
            raise UserError(f"{where}: only users show videos; expected texts and images")
        if isinstance(part, str):
            add_text(parts, Text(clean(part, where), "assistant"))
        else:
            parts.append(Image(read_image(part, size, where), ""))
    return [*parts, Text("", "assistant")] if parts and isinstance(parts[-1], Image) else parts


def _text(content: Sequence[str | ImageLike | Video], where: str) -> str:
    texts = [part for part in content if isinstance(part, str)]
    if len(texts) < len(content):
        raise UserError(f"{where}: it shows an image or a video; expected text")
    return clean(join_texts(texts), where)
