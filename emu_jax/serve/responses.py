"""POST /v1/responses, OpenAI's newer API for chats: its request, its answer, and the events of its stream.

Nothing is stored: a client sends the whole conversation each time, our answers' `output` items among it.
"""

from __future__ import annotations

import dataclasses
import time
import uuid
from collections.abc import AsyncIterator
from typing import Annotated, Any

from pydantic import WithJsonSchema as Schema

from emu_jax.serve.choices import ChatChoice
from emu_jax.serve.encoded_prompt import ASSISTANT_ROLE, SYSTEM_ROLE, USER_ROLE
from emu_jax.serve.engine import Completion
from emu_jax.serve.limits import Limits
from emu_jax.serve.openai_json import (
    PARTS,
    ROLES,
    TEXT,
    ChatMessage,
    DecodingRequest,
    check_messages,
    check_new_tokens,
    refuse,
)
from emu_jax.serve.parts import ImageField
from emu_jax.serve.settings import DrawSettings, TextSettings

DRAWN = "image_generation_call"  # type of an item that is an image


# JSON schemas of the items of `input`.
MESSAGE = {
    "type": "object",
    "properties": {"type": {"const": "message"}, "role": {"enum": list(ROLES)}, "content": {"anyOf": [TEXT, PARTS]}},
    "required": ["role", "content"],
}
IMAGE = {"type": "object", "properties": {"type": {"const": DRAWN}, "result": TEXT}, "required": ["type", "result"]}


class ResponseRequest(DecodingRequest):
    """The body. `input` is a text, or a list of messages and of items of earlier answers."""

    model: str
    input: Annotated[Any, Schema({"anyOf": [TEXT, {"type": "array", "items": {"anyOf": [MESSAGE, IMAGE]}}]})]
    instructions: str | None = None
    max_output_tokens: int | None = None

    def settings(self) -> TextSettings:
        """The decoding settings."""
        return self._settings(self.max_output_tokens)

    def drawing(self) -> DrawSettings:
        """The settings of an image that the answer begins."""
        return DrawSettings(**self.given("seed"))

    def read(self, limits: Limits) -> list[tuple[str, list[str | ImageField]]]:
        """The messages as (role, parts), `instructions` first.

        Raises:
          UserError: a request beyond the limits, before any image is decoded.
        """
        self.check_fields()
        check_new_tokens("max_output_tokens", self.max_output_tokens)
        messages = [] if self.instructions is None else [(SYSTEM_ROLE, _parts(self.instructions))]
        if isinstance(self.input, str):
            messages.append((USER_ROLE, _parts(self.input)))
        elif isinstance(self.input, list):
            messages += [_read_item(item, f"input[{index}]") for index, item in enumerate(self.input)]
        else:
            raise refuse("input", self.input, "a text, or a list of messages")
        check_messages(messages, "input", limits)
        self.settings().check(limits)
        return messages


def _parts(text: str) -> list[str | ImageField]:
    return [text]


def _read_item(item: Any, where: str) -> tuple[str, list[str | ImageField]]:
    """A message, or an image that an earlier answer drew."""
    if not isinstance(item, dict):
        raise refuse(where, item, 'an object such as {"role": "user", "content": "…"}')
    kind = item.get("type", "message")
    if kind == DRAWN:
        if not isinstance(item.get("result"), str):
            raise refuse(f"{where}.result", item.get("result"), "an image in base64")
        return ASSISTANT_ROLE, [ImageField(f"data:;base64,{item['result']}", f"{where}.result")]
    if kind != "message":
        raise refuse(f"{where}.type", kind, f"message or {DRAWN}")
    role = item.get("role")
    if role not in ROLES:
        raise refuse(f"{where}.role", role, f"one of {', '.join(ROLES)}")
    fields = {name: value for name, value in item.items() if name != "type"}
    return role, ChatMessage.model_validate(fields).parts(where)


@dataclasses.dataclass
class ResponseAnswer(ChatChoice):
    """The answer as a response; `body` is the request and `model` the model's name."""

    body: ResponseRequest | None = None
    model: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.created = time.time()
        self._id, self._message_id, self._image_id = (f"{kind}_{uuid.uuid4().hex}" for kind in ("resp", "msg", "ig"))

    async def whole(self) -> dict[str, Any]:
        completion = await self.finish()
        image = await self._image(completion)
        return self._response([self._message(completion.text, image), *self._drawn(image)], completion)

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        """The events of a stream: the text in pieces, then what `whole` returns."""
        number = 0

        def event(kind: str, **fields: Any) -> dict[str, Any]:
            nonlocal number
            number += 1
            return {"type": f"response.{kind}", "sequence_number": number - 1, **fields}

        here = {"item_id": self._message_id, "output_index": 0, "content_index": 0}
        yield event("created", response=self._response([]))
        yield event("in_progress", response=self._response([]))
        yield event("output_item.added", output_index=0, item=self._item([], "in_progress"))
        yield event("content_part.added", **here, part=_text_part(""))
        async for piece in self.ticket:
            yield event("output_text.delta", **here, delta=piece, logprobs=[])
        completion = await self.finish()
        image = await self._image(completion)
        message, drawn = self._message(completion.text, image), self._drawn(image)
        yield event("output_text.done", **here, text=completion.text, logprobs=[])
        yield event("content_part.done", **here, part=_text_part(completion.text))
        yield event("output_item.done", output_index=0, item=message)
        for item in drawn:
            yield event("output_item.added", output_index=1, item={**item, "status": "in_progress", "result": None})
            yield event("output_item.done", output_index=1, item=item)
        response = self._response([message, *drawn], completion)
        yield event(response["status"], response=response)

    def _item(self, content: list[dict[str, Any]], status: str = "completed") -> dict[str, Any]:
        return {
            "type": "message",
            "id": self._message_id,
            "role": ASSISTANT_ROLE,
            "status": status,
            "content": content,
        }

    def _message(self, text: str, image: dict[str, Any]) -> dict[str, Any]:
        refused = [{"type": "refusal", "refusal": image["refusal"]}] if "refusal" in image else []
        return self._item([_text_part(text), *refused])

    def _drawn(self, image: dict[str, Any]) -> list[dict[str, Any]]:
        return [
            {
                "type": DRAWN,
                "id": self._image_id,
                "status": "completed",
                "result": part["image_url"]["url"].partition(",")[2],
                "seed": part["seed"],
            }
            for part in image.get("images", [])
        ]

    def _response(self, output: list[dict[str, Any]], completion: Completion | None = None) -> dict[str, Any]:
        """The response; without a completion it is in progress."""
        assert self.body is not None
        is_cut = completion is not None and completion.ended_by == "length"
        usage = None
        if completion is not None:
            usage = {
                "input_tokens": completion.prompt_tokens,
                "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
                "output_tokens": completion.new_tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": completion.prompt_tokens + completion.new_tokens,
            }
        return {
            "id": self._id,
            "object": "response",
            "created_at": int(self.created),
            "status": "in_progress" if completion is None else "incomplete" if is_cut else "completed",
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "instructions": self.body.instructions,
            "max_output_tokens": self.body.max_output_tokens,
            "model": self.model,
            "output": output,
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "store": False,
            "temperature": self.body.temperature,
            "text": {"format": {"type": "text"}},
            "tool_choice": "none",
            "tools": [],
            "top_p": self.body.top_p,
            "truncation": "disabled",
            "usage": usage,
            "metadata": {},
        }


def _text_part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
