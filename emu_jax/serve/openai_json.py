"""JSON of OpenAI's clients -> messages, prompts and settings for the engine. Nothing is fetched: images are data URLs.

A request is checked completely before anything is computed. Unsupported fields that would change the answer (tools,
a mask, …) are refused by name, unless they ask for what is done anyway (`NEUTRAL`); fields that would not (a user's
name, …) are ignored. Clients differ in how they write a message's content: `read_content` knows their shapes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
import pydantic
from pydantic import WithJsonSchema as Schema

from emu_jax.serve.continuous_batching import LIKELIEST
from emu_jax.serve.data_urls import is_data_url
from emu_jax.serve.encoded_prompt import ASSISTANT_ROLE, SYSTEM_ROLE, Message
from emu_jax.serve.limits import LimitError, Limits
from emu_jax.serve.parts import ImageField
from emu_jax.serve.settings import DrawSettings, TextSettings

# Ignored fields, and values of unsupported fields that ask for the default behaviour.
IGNORED = {"user", "store", "metadata", "service_tier", "quality", "style", "safety_identifier", "prompt_cache_key"}
IGNORED |= {"prompt_cache_retention", "request_id", "priority"}
IGNORED_IN_MESSAGES = {"name", "id", "refusal", "annotations", "cache_control", "detail", "format", "reasoning_content"}
IGNORED_IN_MESSAGES |= {"status", "logprobs", "phase"}
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "repeat_penalty": (1,),
    "length_penalty": (1,),
    "no_repeat_ngram_size": (0,),
    "min_p": (0,),
    "typical_p": (1,),
    "min_tokens": (0,),
    "num_beams": (1,),
    "use_beam_search": (False,),
    "logit_bias": ({}, []),
    "bad_words": ([],),
    "stop_token_ids": ([],),
    "ignore_eos": (False,),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "add_special_tokens": (True,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "chat_template_kwargs": ({},),
    "mm_processor_kwargs": ({},),
    "response_format": ({"type": "text"},),
    "modalities": (["text"], ["text", "image"], ["image", "text"]),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "tool_calls": ([],),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "echo": (False,),
    "suffix": ("",),
    "stream": (False,),
    "partial_images": (0,),
    "background": ("auto", "opaque", False),
    "truncation": ("disabled",),
    "include": ([],),
    "reasoning": ({}, {"effort": "none"}),
    "text": ({}, {"format": {"type": "text"}}, {"format": {"type": "text"}, "verbosity": "medium"}),
    "stream_options": ({}, {"include_obfuscation": False}),
    "output_format": ("png",),
    "output_compression": (100,),
    "input_fidelity": ("low",),
    "moderation": ("auto",),
    "extra_body": ({},),
}

ROLES = ("system", "developer", "user", "assistant")  # of messages
# Of the parts of a message's content: Chat Completions, Responses, and what assistants' own messages have.
TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
IMAGE_PARTS = ("image_url", "input_image")


# JSON schemas of what is read by hand, for the OpenAPI document.
TEXT, NULL = {"type": "string"}, {"type": "null"}
URL = {"anyOf": [TEXT, {"type": "object", "properties": {"url": TEXT}, "required": ["url"]}]}
PART = {
    "oneOf": [
        {"type": "object", "properties": {"type": {"const": kind}, field: schema}, "required": ["type", field]}
        for kind, field, schema in [
            *((kind, field, TEXT) for kind, field in TEXT_PARTS.items()),
            *((kind, "image_url", URL) for kind in IMAGE_PARTS),
        ]
    ]
}
PARTS = {"type": "array", "items": {"anyOf": [TEXT, PART]}}
INPUT = [TEXT, PART]  # of what is embedded
CONTENT = Schema({"anyOf": [TEXT, PARTS, NULL], "description": "Null or absent only of an assistant."})
IMAGES = Schema({"anyOf": [{"type": "array", "items": {"anyOf": [URL, PART]}}, NULL], "description": "Data URLs."})


def check_fields(fields: Mapping[str, Any], where: str = "") -> None:
    """Raises LimitError for a field that would change the answer and is not supported; `where` is what has it."""
    for name, value in fields.items():
        if value is None or name in IGNORED or value in NEUTRAL.get(name, ()):
            continue
        if where and name in IGNORED_IN_MESSAGES:
            continue
        name = f"{where}.{name[:100]}" if where else name[:100]
        raise LimitError(name, f"{name} is not supported here; leave it out")


def refuse(where: str, value: Any, expected: str) -> LimitError:
    """An error about a field's value, in a few words."""
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    found = names.get(type(value), "a number")
    if isinstance(value, str) and len(value) <= 40:
        found = repr(value)
    return LimitError(where, f"{where} is {found}; expected {expected}")


def read_content(content: Any, where: str) -> list[str | ImageField]:
    """A message's content: one text, or a list of texts and parts."""
    if isinstance(content, str):
        return [content]
    if not isinstance(content, list):
        raise refuse(where, content, "a text, or a list of parts")
    return [read_part(part, f"{where}[{index}]") for index, part in enumerate(content)]


def read_part(part: Any, where: str) -> str | ImageField:
    """A part of a message's content.

    >>> read_part({"type": "input_text", "text": "what is it?"}, "messages[0].content[0]")
    'what is it?'
    >>> read_part({"type": "image_url", "image_url": "data:…"}, "messages[0].content[0]")
    ImageField(url='data:…', where='messages[0].content[0].image_url')
    """
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise refuse(where, part, 'an object such as {"type": "text", "text": "…"}')
    kind, others = part.get("type"), {name: value for name, value in part.items() if name != "type"}
    if isinstance(kind, str) and kind in TEXT_PARTS:
        name = TEXT_PARTS[kind]
        value, where = others.pop(name, None), f"{where}.{name}"
        if not isinstance(value, str):
            raise refuse(where, value, "a text")
        check_fields(others, where.rpartition(".")[0])
        return value
    if kind not in IMAGE_PARTS:
        raise refuse(f"{where}.type", kind, "text, input_text, image_url or input_image")
    value = others.pop("image_url", None)
    others.pop("seed", None)  # in the images of our own answers
    check_fields(others, where)
    return read_url(value, f"{where}.image_url")


def read_url(value: Any, where: str) -> ImageField:
    """An image's data URL, on its own or as {"url": …}."""
    if isinstance(value, dict):
        check_fields({name: each for name, each in value.items() if name != "url"}, where)
        value, where = value.get("url"), f"{where}.url"
    if not isinstance(value, str):
        raise refuse(where, value, "a data URL, data:image/png;base64,…")
    return ImageField(value, where)


def read_images(value: Any, where: str) -> list[ImageField]:
    """A list of images: data URLs, {"url": …}, {"image_url": …}, or parts of a content."""
    if value is None:
        return []
    if not isinstance(value, list):
        raise refuse(where, value, "a list of data URLs")
    images = []
    for index, each in enumerate(value):
        name = f"{where}[{index}]"
        if isinstance(each, dict) and "url" not in each:
            each = read_part({"type": IMAGE_PARTS[0], **each}, name)
        images.append(each if isinstance(each, ImageField) else read_url(each, name))
    return images


def check_parts(parts: Sequence[str | ImageField], limits: Limits) -> None:
    """Raises UserError for too much text or too many images, before any image is decoded."""
    limits.check_images(sum(isinstance(part, ImageField) for part in parts))
    limits.check_text(*(part for part in parts if isinstance(part, str)))


def check_new_tokens(field: str, count: int | None) -> None:
    """Raises LimitError for a maximum of new tokens below 1."""
    if count is not None and count < 1:
        raise LimitError(field, f"{field}={count}; expected 1 or more")


def check_messages(messages: Sequence[tuple[str, list[str | ImageField]]], where: str, limits: Limits) -> None:
    """`check_parts` for the parts of messages, of which there must be some; `where` is the field that holds them."""
    if not 1 <= len(messages) <= limits.messages:
        raise LimitError(where, f"{len(messages)} messages; expected 1 to {limits.messages}")
    check_parts([part for _, parts in messages for part in parts], limits)


class _Request(pydantic.BaseModel):
    """The supported fields; `check_fields` checks all others."""

    model_config = pydantic.ConfigDict(extra="allow", strict=True)

    def check_fields(self, where: str = "") -> None:
        """Raises LimitError for an unsupported field that would change the answer."""
        check_fields(self.model_extra or {}, where)

    def given(self, *names: str) -> dict[str, Any]:
        """Those of the fields that are not null."""
        return {name: value for name in names if (value := getattr(self, name)) is not None}


class _ImageSettings(_Request):
    """Settings of drawn images."""

    sampler: str | None = None
    steps: int | None = None
    guidance: float | None = None
    seed: int | None = None

    def drawing(self) -> DrawSettings:
        """The settings of the first image."""
        return DrawSettings(**self.given("sampler", "steps", "guidance", "seed"))


class StreamOptions(_Request):
    """Whether a last chunk has the usage; chunks are never padded (obfuscated)."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class DecodingRequest(_Request):
    """What all requests for texts share. `top_k` and `min_length` are extensions."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_length: int | None = None
    seed: int | None = None
    stream: bool | None = None

    def _settings(self, max_new_tokens: int | None, **settings: Any) -> TextSettings:
        """The decoding settings of the first text; without a temperature, decoding is greedy."""
        given = self.given("temperature", "top_k", "top_p", "min_length", "seed")
        if given.get("top_p") == 0:  # the likeliest token
            given |= {"temperature": 0.0, "top_p": 1.0}
        if given.get("top_k") == -1:  # all tokens, as vLLM's clients write it
            del given["top_k"]
        return TextSettings(max_new_tokens, **given, **settings)


class _CompletionsRequest(DecodingRequest):
    """What both kinds of completions share."""

    max_tokens: int | None = None
    n: int | None = None
    stop: Annotated[Any, Schema({"anyOf": [TEXT, {"type": "array", "items": TEXT}, NULL]})] = None
    stream_options: StreamOptions | None = None

    @property
    def count(self) -> int:
        """Number of texts for each prompt."""
        return 1 if self.n is None else self.n

    def check_fields(self, where: str = "") -> None:
        super().check_fields(where)
        if self.stream_options is not None:
            self.stream_options.check_fields("stream_options")

    @property
    def usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def _stop(self) -> tuple[str, ...]:
        stops = self.stop if isinstance(self.stop, list) else [] if self.stop is None else [self.stop]
        for index, stop in enumerate(stops):
            if not isinstance(stop, str):
                raise refuse(f"stop[{index}]" if isinstance(self.stop, list) else "stop", stop, "a text")
        return tuple(stop for stop in stops if stop)


class ChatMessage(_Request):
    """A message; "developer" is a synonym of "system". `images` are those of our own answers, sent back."""

    role: Literal["system", "developer", "user", "assistant"]  # `ROLES`
    content: Annotated[Any, CONTENT] = None
    images: Annotated[Any, IMAGES] = None

    def parts(self, where: str) -> list[str | ImageField]:
        """Texts and images in order. An assistant's message may have no content; it drew its images after its text."""
        self.check_fields(where)
        images = read_images(self.images, f"{where}.images")
        if self.role != ASSISTANT_ROLE:
            return [*images, *read_content(self.content, f"{where}.content")]
        return [*([""] if self.content is None else read_content(self.content, f"{where}.content")), *images]


class ChatRequest(_CompletionsRequest):
    """POST /v1/chat/completions."""

    model: str
    messages: list[ChatMessage]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None

    def settings(self) -> TextSettings:
        """The decoding settings of the first answer."""
        wanted = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        return self._settings(wanted, stop=self._stop(), scored=bool(self.logprobs))

    def drawing(self) -> DrawSettings:
        """The settings of an image that the first answer begins."""
        return DrawSettings(**self.given("seed"))

    def read(self, limits: Limits) -> list[tuple[str, list[str | ImageField]]]:
        """The messages as (role, parts).

        Raises:
          UserError: a request beyond the limits, before any image is decoded.
        """
        self.check_fields()
        check_new_tokens("max_completion_tokens", self.max_completion_tokens)
        limits.check("n", self.count, 1, limits.choices)
        if self.top_logprobs:
            limits.check("top_logprobs", self.top_logprobs, 0, LIKELIEST)
            if not self.logprobs:
                raise LimitError("top_logprobs", "top_logprobs is given without logprobs; expected logprobs: true, too")
        messages: list[tuple[str, list[str | ImageField]]] = [
            (each.role, each.parts(f"messages[{number}]")) for number, each in enumerate(self.messages)
        ]
        check_messages(messages, "messages", limits)
        self.settings().check(limits)
        return messages


def to_messages(roles: Sequence[str], contents: Sequence[Sequence[str | np.ndarray]]) -> list[Message]:
    """Messages of decoded parts; "developer" is a synonym of "system", and no part an empty text."""
    names = {"developer": SYSTEM_ROLE}
    return [Message(names.get(role, role), tuple(parts) or ("",)) for role, parts in zip(roles, contents, strict=True)]


class CompletionRequest(_CompletionsRequest):
    """POST /v1/completions. `images` (data URLs, before each prompt) is an extension."""

    model: str
    prompt: Annotated[Any, Schema({"anyOf": [TEXT, {"type": "array", "items": TEXT}]})]
    images: Annotated[Any, IMAGES] = None
    logprobs: int | None = None
    best_of: int | None = None

    def settings(self) -> TextSettings:
        """The decoding settings of a prompt's first text."""
        wanted = 16 if self.max_tokens is None else self.max_tokens
        return self._settings(wanted, stop=self._stop(), scored=self.logprobs is not None)

    def read(self, limits: Limits) -> list[list[str | ImageField]]:
        """The prompts.

        Raises:
          UserError: a request beyond the limits, before any image is decoded.
        """
        self.check_fields()
        prompts = self.prompt if isinstance(self.prompt, list) else [self.prompt]
        for index, prompt in enumerate(prompts):
            if not isinstance(prompt, str):
                where = f"prompt[{index}]" if isinstance(self.prompt, list) else "prompt"
                raise refuse(where, prompt, "a text; token ids are not read")
        limits.check("n", self.count, 1, limits.choices)
        if not 1 <= len(prompts) * self.count <= limits.choices:
            raise LimitError(
                "prompt", f"{len(prompts)} prompts, and n={self.count}; expected 1 to {limits.choices} texts"
            )
        if self.best_of not in (None, self.count):
            raise LimitError("best_of", f"best_of={self.best_of}; expected n={self.count}, all texts are returned")
        if self.logprobs is not None:
            limits.check("logprobs", self.logprobs, 0, LIKELIEST)
        images = read_images(self.images, "images")
        check_parts([*images, *prompts], limits)
        self.settings().check(limits)
        return [[*images, prompt] if prompt else list(images) for prompt in prompts]


class EmbeddingRequest(_Request):
    """POST /v1/embeddings. An input is a text, an image (a data URL or a content part), or a list of such parts.

    `pooling` is an extension: "none" for all Q embeddings of an image, one after the other, or "mean" for their mean.
    """

    model: str
    input: Annotated[Any, Schema({"anyOf": [*INPUT, {"type": "array", "items": {"anyOf": [*INPUT, PARTS]}}]})]
    encoding_format: Literal["float", "base64"] | None = None
    pooling: Literal["none", "mean"] | None = None

    def read(self, limits: Limits) -> list[list[str | ImageField]]:
        """The inputs, each as its parts.

        Raises:
          UserError: a request beyond the limits, before any image is decoded.
        """
        self.check_fields()
        given = self.input if isinstance(self.input, list) else [self.input]
        if not 1 <= len(given) <= limits.choices:
            raise LimitError("input", f"{len(given)} inputs; expected 1 to {limits.choices}")
        inputs: list[list[str | ImageField]] = []
        for index, each in enumerate(given):
            where = f"input[{index}]" if isinstance(self.input, list) else "input"
            if isinstance(each, list):
                inputs.append(read_content(each, where))
            elif isinstance(each, dict):
                inputs.append([read_part(each, where)])
            elif isinstance(each, str):
                inputs.append([ImageField(each, where) if is_data_url(each) else each])
            else:
                raise refuse(where, each, "a text, a data URL, or parts of a message's content; token ids are not read")
            if not any(inputs[-1]):
                raise LimitError(where, f"{where} is empty; expected a text or an image")
        check_parts([part for parts in inputs for part in parts], limits)
        return inputs


class ImageRequest(_ImageSettings):
    """POST /v1/images/generations, edits and variations: what is drawn follows the images, then the prompt.

    `images` (data URLs) and the sampling settings are extensions.
    """

    prompt: str | None = None
    model: str | None = None
    n: int | None = None
    size: str | None = None
    response_format: str | None = None
    images: Annotated[Any, IMAGES] = None

    def settings(self) -> list[DrawSettings]:
        """The settings of each image, with consecutive seeds."""
        return [self.drawing().following(number) for number in range(1 if self.n is None else self.n)]

    def read(self, limits: Limits, size: int) -> list[ImageField]:
        """The images; `size` is the height and width of drawn images.

        Raises:
          UserError: a request beyond the limits, before any image is decoded.
        """
        self.check_fields()
        limits.check("n", 1 if self.n is None else self.n, 1, limits.drawings)
        images = read_images(self.images, "images")
        check_parts([*images, self.prompt or ""], limits)
        if self.size not in (None, "auto", f"{size}x{size}"):
            raise LimitError("size", f"size={self.size[:100]!r}; this model draws {size}x{size}")
        if self.response_format not in (None, "b64_json"):
            raise LimitError(
                "response_format",
                f"response_format={self.response_format[:100]!r}; expected b64_json, nothing is stored",
            )
        return images
