"""JSON of OpenAI's clients -> messages and settings for the engine. Nothing is fetched: images are data URIs.

A request is checked completely before anything is computed. Unsupported fields that would change the answer (tools,
several choices, …) are refused; fields that would not (a user's name, …) are ignored.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
from typing import Any, Literal

import numpy as np
import pydantic

from emu_jax.data.images import decode_image
from emu_jax.errors import UserError
from emu_jax.serve.encoded_prompt import Message
from emu_jax.serve.engine import DrawSettings, TextSettings
from emu_jax.serve.limits import LimitError, Limits

# Ignored fields, and values of unsupported fields that ask for the default behaviour.
IGNORED = {"user", "store", "metadata", "service_tier", "quality", "style", "safety_identifier", "prompt_cache_key"}
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0, 0.0),
    "presence_penalty": (0, 0.0),
    "logprobs": (False,),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "stop": ([],),
    "logit_bias": ({},),
    "parallel_tool_calls": (True, False),
    "background": ("auto", "opaque"),
    "output_format": ("png",),
    "moderation": ("auto",),
}


class _Request(pydantic.BaseModel):
    """The supported fields; `check_fields` checks all others."""

    model_config = pydantic.ConfigDict(extra="allow", strict=True)

    def check_fields(self) -> None:
        """Raises UserError for an unsupported field that would change the answer."""
        for name, value in (self.model_extra or {}).items():
            if value is None or name in IGNORED or value in NEUTRAL.get(name, ()):
                continue
            raise LimitError(name[:100], f"{name[:100]} is not supported here; leave it out")

    def given(self, *names: str) -> dict[str, Any]:
        """Those of the fields that are not null."""
        return {name: value for name in names if (value := getattr(self, name)) is not None}


class TextPart(_Request):
    """{"type": "text", "text": …}."""

    type: Literal["text"]
    text: str


class ImageUrl(_Request):
    """{"url": "data:image/png;base64,…"}; `detail` is ignored: the model has one image size."""

    url: str
    detail: str | None = None


class ImagePart(_Request):
    """{"type": "image_url", "image_url": …}."""

    type: Literal["image_url"]
    image_url: ImageUrl


class ChatMessage(_Request):
    """A message; "developer" is a synonym of "system"."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart | ImagePart]


class StreamOptions(_Request):
    """Whether a last chunk has the usage."""

    include_usage: bool = False


class ChatRequest(_Request):
    """POST /v1/chat/completions. `top_k` and `min_length` are extensions."""

    model: str
    messages: list[ChatMessage]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_length: int | None = None
    seed: int | None = None
    n: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    def settings(self) -> TextSettings:
        """The decoding settings; without a temperature, decoding is greedy."""
        wanted = self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens
        return TextSettings(wanted, **self.given("temperature", "top_k", "top_p", "min_length", "seed"))

    def drawing(self) -> DrawSettings:
        """The settings of an image that the answer begins."""
        return DrawSettings(**self.given("seed"))

    def check(self, limits: Limits) -> None:
        """Raises UserError for a request beyond the limits, before any image is decoded."""
        self.check_fields()
        if self.n not in (None, 1):
            raise LimitError("n", f"n={self.n}; expected 1, ask again for another answer")
        if not 1 <= len(self.messages) <= limits.messages:
            raise LimitError("messages", f"{len(self.messages)} messages; expected 1 to {limits.messages}")
        parts = [part for message in self.messages for part in _parts(message)]
        limits.check_images(sum(isinstance(part, ImagePart) for part in parts))
        limits.check_text(*(part if isinstance(part, str) else getattr(part, "text", "") for part in parts))
        self.settings().check(limits)

    def decode(self, limits: Limits) -> list[Message]:
        """The messages, with images uint8 [H, W, 3]; slow where they hold large images."""
        messages = []
        for number, message in enumerate(self.messages):
            role = "system" if message.role == "developer" else message.role
            parts: list[str | np.ndarray] = []
            for index, part in enumerate(_parts(message)):
                if isinstance(part, ImagePart):
                    where = f"messages[{number}].content[{index}].image_url"
                    parts.append(decode_data_uri(part.image_url.url, where, limits))
                else:
                    parts.append(part if isinstance(part, str) else part.text)
            messages.append(Message(role, tuple(parts)))
        return messages


def _parts(message: ChatMessage) -> list[str | TextPart | ImagePart]:
    return [message.content] if isinstance(message.content, str) else list(message.content)


class ImageRequest(_Request):
    """POST /v1/images/generations. Extensions: `images` (data URIs, before the prompt) and the sampling settings."""

    prompt: str
    model: str | None = None
    n: int | None = None
    size: str | None = None
    response_format: str | None = None
    images: list[str] | None = None
    sampler: str | None = None
    steps: int | None = None
    guidance: float | None = None
    seed: int | None = None

    def settings(self) -> list[DrawSettings]:
        """The settings of each image, with consecutive seeds."""
        first = DrawSettings(**self.given("sampler", "steps", "guidance", "seed"))
        return [dataclasses.replace(first, seed=first.seed + number) for number in range(self.n or 1)]

    def check(self, limits: Limits, size: int) -> None:
        """Raises UserError for a request beyond the limits; `size` is the height and width of drawn images."""
        self.check_fields()
        limits.check("n", 1 if self.n is None else self.n, 1, limits.drawings)
        limits.check_text(self.prompt)
        limits.check_images(len(self.images or ()))
        if self.size not in (None, "auto", f"{size}x{size}"):
            raise LimitError("size", f"size={self.size[:100]!r}; this model draws {size}x{size}")
        if self.response_format not in (None, "b64_json"):
            raise LimitError(
                "response_format",
                f"response_format={self.response_format[:100]!r}; expected b64_json, nothing is stored",
            )

    def decode(self, limits: Limits) -> list[str | np.ndarray]:
        """The prompt: its images, then its text."""
        shown = [decode_data_uri(uri, f"images[{index}]", limits) for index, uri in enumerate(self.images or ())]
        return [*shown, self.prompt] if self.prompt else list(shown)


def decode_data_uri(uri: str, where: str, limits: Limits) -> np.ndarray:
    """data:image/…;base64,… -> uint8 [H, W, 3].

    Raises:
      UserError: another scheme (addresses are never fetched), not base64, too many bytes or pixels, or no image.
    """
    head, comma, data = uri.partition(",")
    if not comma or not head.startswith("data:image/") or not head.endswith(";base64"):
        raise LimitError(
            where, f"{where} is {uri[:40]!r}…; expected data:image/png;base64,… (or jpeg, webp): no address is fetched"
        )
    limits.check_upload(len(data) * 3 // 4, where)
    try:
        return decode_image(base64.b64decode(data, validate=True), where)
    except binascii.Error as error:
        raise UserError(f"{where}: not base64 ({error})") from error
