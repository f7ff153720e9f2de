"""The HTTP API that OpenAI's clients can talk to, with /healthz and /metrics beside it.

GET  /v1/models   /v1/models/NAME
POST /v1/chat/completions       text and images (data URIs); streaming
POST /v1/images/generations     b64_json
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

import pydantic
from fastapi import FastAPI
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from emu_jax.errors import UserError
from emu_jax.serve.engine import Busy, Engine, Failed, Stopping, Ticket, TimeUp, Written
from emu_jax.serve.guard import Refusal, error_body
from emu_jax.serve.limits import LimitError
from emu_jax.serve.metrics import Metrics
from emu_jax.serve.openai_json import ChatRequest, ImageRequest
from emu_jax.serve.sequences import ContextError

Handler = Callable[[Request], Awaitable[Response]]
Body = TypeVar("Body", bound=pydantic.BaseModel)
Result = TypeVar("Result")
OWNER = "emu_jax"
GONE = 499  # the status, in metrics alone, of a client that left


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


def add_routes(app: FastAPI, engine: Engine, name: str, metrics: Metrics) -> None:
    """Adds the API of one engine, whose model is called `name`."""
    api = _Api(engine, name)
    routes: list[tuple[str, str, Handler]] = [
        ("GET", "/v1/models", api.models),
        ("GET", "/v1/models/{model:path}", api.model),
        ("POST", "/v1/chat/completions", api.chat),
        ("POST", "/v1/images/generations", api.images),
        ("GET", "/healthz", api.health),
    ]
    for method, path, handler in routes:
        app.router.add_route(path, _answered(handler, path, metrics), methods=[method])

    async def exposed(request: Request) -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    app.router.add_route("/metrics", exposed, methods=["GET"])

    async def unknown(request: Request) -> Response:
        return _refused(Refusal(404, f"{request.method} {request.url.path[:100]} is not served here", code="not_found"))

    app.router.add_route("/v1/{rest:path}", unknown, methods=["GET", "POST", "PUT", "DELETE", "PATCH"])


def _answered(handler: Handler, route: str, metrics: Metrics) -> Handler:
    """A handler whose errors are answered as OpenAI's clients expect, and which is counted."""

    async def answered(request: Request) -> Response:
        with metrics.timed(route) as outcome:
            try:
                response = await handler(request)
            except ClientGone:
                response = Response(status_code=GONE)
            except Exception as error:  # `_refusal` raises again what it does not know: a logged 500
                response = _refused(*_refusal(error))
            outcome.status = response.status_code
        return response

    return answered


def _refusal(error: Exception) -> tuple[Refusal, str | None]:
    """An error -> the status and words it is told with, and the parameter that it is about."""
    match error:
        case Refusal():
            return error, None
        case pydantic.ValidationError():
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(str(part) for part in first["loc"])[:200]
            return Refusal(400, f"{where}: {first['msg']}" if where else first["msg"], code="invalid_value"), where
        case LimitError():
            return Refusal(400, str(error), code="invalid_value"), error.parameter
        case ContextError():
            return Refusal(400, str(error), code="context_length_exceeded"), "messages"
        case UserError():
            return Refusal(400, str(error), code="invalid_value"), None
        case Busy():
            return Refusal(429, str(error), kind="rate_limit_error", code="queue_full"), None
        case Stopping():
            return Refusal(503, str(error), kind="server_error", code="stopping"), None
        case TimeUp():
            return Refusal(504, str(error), kind="server_error", code="timeout"), None
        case Failed():
            return Refusal(500, str(error), kind="server_error", code="model_failed"), None
    raise error


def _refused(refusal: Refusal, param: str | None = None) -> JSONResponse:
    headers = {"retry-after": "2"} if refusal.status in (429, 503) else None
    return JSONResponse(error_body(refusal, param), refusal.status, headers=headers)


class _Api:
    """The handlers."""

    def __init__(self, engine: Engine, name: str):
        self.engine, self.name = engine, name
        self.created = int(time.time())

    # ------------------------------------------------------------ what there is

    def _card(self) -> dict[str, Any]:
        return {"id": self.name, "object": "model", "created": self.created, "owned_by": OWNER}

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def model(self, request: Request) -> Response:
        self._check_model(request.path_params["model"])
        return JSONResponse(self._card())

    async def health(self, request: Request) -> Response:
        healthy = self.engine.healthy
        waits = {"waiting": self.engine.waiting(), "running": self.engine.running()}
        return JSONResponse({"status": "ok" if healthy else "broken", **waits}, 200 if healthy else 503)

    def _check_model(self, model: str | None) -> None:
        if model is not None and model != self.name:
            raise Refusal(
                404, f"the model {model[:100]!r} is not served here; there is {self.name!r}", code="model_not_found"
            )

    # ------------------------------------------------------------ chat

    async def chat(self, request: Request) -> Response:
        asked = await _parse(ChatRequest, request)
        self._check_model(asked.model)
        asked.check(self.engine.limits)
        messages = await asyncio.to_thread(asked.decode, self.engine.limits)
        ticket = await self.engine.chat(messages, asked.settings())
        about = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": self.name}
        if asked.stream:
            usage = asked.stream_options is not None and asked.stream_options.include_usage
            return StreamingResponse(_events(ticket, about, usage), media_type="text/event-stream", headers=NO_CACHE)
        written = await _unless_gone(request, ticket)
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": written.text, "refusal": None},
            "finish_reason": _reason(written),
            "logprobs": None,
        }
        return JSONResponse({**about, "object": "chat.completion", "choices": [choice], "usage": _usage(written)})

    # ------------------------------------------------------------ images

    async def images(self, request: Request) -> Response:
        asked = await _parse(ImageRequest, request)
        self._check_model(asked.model)
        decoder = self.engine.plain.decoder
        if decoder is None:
            raise UserError(
                "this model has no visual decoder; serve one with unet and vae beside it, or give --decoder"
            )
        asked.check(self.engine.limits, decoder.size)
        prompt = await asyncio.to_thread(asked.decode, self.engine.limits)
        tickets: list[Ticket] = []
        try:
            for settings in asked.settings():
                tickets.append(await self.engine.draw(prompt, settings))
            drawn = [await _unless_gone(request, ticket) for ticket in tickets]
        finally:
            for ticket in tickets:
                ticket.cancel()
        data = []
        for result in drawn:
            file = io.BytesIO()
            result.image.save(file, "PNG")
            data.append({"b64_json": base64.b64encode(file.getvalue()).decode(), "seed": result.seed})
        return JSONResponse({"created": int(time.time()), "data": data})


NO_CACHE = {"cache-control": "no-cache", "x-accel-buffering": "no"}


async def _parse(kind: type[Body], request: Request) -> Body:
    body = await request.body()
    # JSON of megabytes would keep all other requests waiting.
    return (
        await asyncio.to_thread(kind.model_validate_json, body)
        if len(body) > 100_000
        else kind.model_validate_json(body)
    )


async def _unless_gone(request: Request, ticket: Ticket[Any, Result]) -> Result:
    """A ticket's result; if the client leaves, the ticket is cancelled.

    Raises:
      ClientGone: it left.
    """

    async def left() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    result, gone = asyncio.ensure_future(ticket.result()), asyncio.ensure_future(left())
    try:
        await asyncio.wait({result, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not result.done():
            raise ClientGone
        return result.result()
    finally:
        ticket.cancel()
        for task in (result, gone):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task


def _reason(written: Written) -> str:
    return "length" if written.ended_by == "length" else "stop"


def _usage(written: Written) -> dict[str, int]:
    return {
        "prompt_tokens": written.prompt_tokens,
        "completion_tokens": written.new_tokens,
        "total_tokens": written.prompt_tokens + written.new_tokens,
    }


async def _events(ticket: Ticket[str, Written], about: dict[str, Any], usage: bool) -> AsyncIterator[bytes]:
    """Server-sent events of a chat completion; the place is freed however this ends."""

    def event(choices: list[dict[str, Any]], **more: Any) -> bytes:
        chunk = {**about, "object": "chat.completion.chunk", "choices": choices, **more}
        return b"data: " + json.dumps(chunk, ensure_ascii=False).encode() + b"\n\n"

    def choice(delta: dict[str, str], reason: str | None = None) -> list[dict[str, Any]]:
        return [{"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}]

    try:
        yield event(choice({"role": "assistant", "content": ""}))
        async for piece in ticket:
            yield event(choice({"content": piece}))
        written = await ticket.result()
        yield event(choice({}, _reason(written)))
        if usage:
            yield event([], usage=_usage(written))
        yield b"data: [DONE]\n\n"
    except (TimeUp, Failed, Stopping) as error:
        refusal, param = _refusal(error)
        yield b"data: " + json.dumps(error_body(refusal, param)).encode() + b"\n\n"
    finally:
        ticket.cancel()
