"""The choices of a completion: each is one text, as a whole or in the chunks of a stream, in OpenAI's form."""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, ClassVar

from emu_jax.generate.chat import UNDRAWN
from emu_jax.generate.decoder import GeneratedImage
from emu_jax.serve.downloads import png
from emu_jax.serve.engine import Completion
from emu_jax.serve.ticket import Ticket
from emu_jax.serve.token_scores import ScoredToken

Drawing = Ticket[tuple[int, int], GeneratedImage]
Draw = Callable[[str], Awaitable[Drawing]]  # a text -> the image that the model began after it
Spell = Callable[[int], tuple[str, bytes]]  # `Tokenizer.piece`


@dataclasses.dataclass
class TextChoice:
    """A choice of /v1/completions.

    Attributes:
      index: its number among the request's choices.
      likeliest: number of likeliest tokens for each scored one.
    """

    object: ClassVar[str] = "text_completion"
    chunk: ClassVar[str] = "text_completion"

    index: int
    ticket: Ticket[str, Completion]
    spell: Spell
    likeliest: int = 0

    def __post_init__(self) -> None:
        self._completion: Completion | None = None

    @property
    def completion(self) -> Completion:
        """The finished text."""
        assert self._completion is not None, "the choice is not finished"
        return self._completion

    async def finish(self) -> Completion:
        """Waits for the text."""
        self._completion = await self.ticket.result()
        return self._completion

    def cancel(self) -> None:
        """Cancels what is not finished."""
        self.ticket.cancel()

    async def whole(self) -> dict[str, Any]:
        """The choice once it is finished."""
        completion = await self.finish()
        return self._choice(completion.text, reason(completion), self._logprobs(completion))

    async def chunks(self) -> AsyncIterator[dict[str, Any]]:
        """The choice in pieces; the last one has the reason of its end, and the log p of all tokens."""
        async for piece in self.ticket:
            yield self._choice(piece)
        completion = await self.finish()
        yield self._choice("", reason(completion), self._logprobs(completion))

    def _choice(self, text: str, reason: str | None = None, logprobs: dict[str, Any] | None = None) -> dict[str, Any]:
        return {"index": self.index, "text": text, "finish_reason": reason, "logprobs": logprobs}

    def _logprobs(self, completion: Completion) -> dict[str, Any] | None:
        if not completion.tokens:
            return None
        offsets, length = [], 0
        for token in completion.tokens:
            offsets.append(length)
            length += len(token.text)
        return {
            "tokens": [token.text for token in completion.tokens],
            "token_logprobs": [token.log_p for token in completion.tokens],
            "top_logprobs": [
                {self.spell(id)[0]: log_p for id, log_p in token.likeliest[: self.likeliest]}
                for token in completion.tokens
            ],
            "text_offset": offsets,
        }


@dataclasses.dataclass
class ChatChoice(TextChoice):
    """A choice of /v1/chat/completions. `draw` begins the image after a text; None without a visual decoder."""

    object: ClassVar[str] = "chat.completion"
    chunk: ClassVar[str] = "chat.completion.chunk"

    draw: Draw | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._drawing: Drawing | None = None

    def cancel(self) -> None:
        super().cancel()
        if self._drawing is not None:
            self._drawing.cancel()

    async def whole(self) -> dict[str, Any]:
        completion = await self.finish()
        message = {"role": "assistant", "content": completion.text, "refusal": None, **await self._image(completion)}
        return {
            "index": self.index,
            "message": message,
            "finish_reason": reason(completion),
            "logprobs": self._logprobs(completion),
        }

    async def chunks(self) -> AsyncIterator[dict[str, Any]]:
        yield self._delta({"role": "assistant", "content": ""})
        async for piece in self.ticket:
            yield self._delta({"content": piece})
        completion = await self.finish()
        if image := await self._image(completion):
            yield self._delta(image)
        yield self._delta({}, reason(completion), self._logprobs(completion))

    def _delta(
        self, delta: dict[str, Any], reason: str | None = None, logprobs: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        return {"index": self.index, "delta": delta, "finish_reason": reason, "logprobs": logprobs}

    async def _image(self, completion: Completion) -> dict[str, Any]:
        """The fields of a message whose answer begins an image."""
        if completion.ended_by != "image":
            return {}
        if self.draw is None:
            return {"refusal": UNDRAWN}
        self._drawing = await self.draw(completion.text)
        return {"images": [image_part(await self._drawing.result())]}

    def _logprobs(self, completion: Completion) -> dict[str, Any] | None:
        if not completion.tokens:
            return None
        return {"content": [self._token(token) for token in completion.tokens], "refusal": None}

    def _token(self, token: ScoredToken) -> dict[str, Any]:
        others = [(*self.spell(id), log_p) for id, log_p in token.likeliest[: self.likeliest]]
        top = [{"token": text, "logprob": log_p, "bytes": list(data)} for text, data, log_p in others]
        return {"token": token.text, "logprob": token.log_p, "bytes": list(token.data), "top_logprobs": top}


Choice = TextChoice | ChatChoice


def image_part(drawn: GeneratedImage) -> dict[str, Any]:
    """A drawn image as the content part that OpenAI's clients send; clients of other servers know `images` too."""
    data = base64.b64encode(png(drawn.image)).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}, "seed": drawn.seed}


def reason(completion: Completion) -> str:
    """Why a text ended, in OpenAI's words."""
    return "length" if completion.ended_by == "length" else "stop"
