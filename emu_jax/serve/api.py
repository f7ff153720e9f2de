"""An HTTP API compatible with OpenAI's clients, and /healthz and /metrics.

GET  /v1/models   /v1/models/NAME
POST /v1/chat/completions       text and images (data URIs); streaming; an image that the answer begins is drawn
POST /v1/images/generations     b64_json
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
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
from emu_jax.generate.chat import UNDRAWN
from emu_jax.generate.decoder import GeneratedImage
from emu_jax.serve.downloads import png
from emu_jax.serve.encoded_prompt import ContextError
from emu_jax.serve.engine import Busy, Completion, Engine, Failed, Stopping, Ticket, TimeUp
from emu_jax.serve.guard import Refusal, error_body, error_response
from emu_jax.serve.limits import LimitError
from emu_jax.serve.metrics import Metrics
from emu_jax.serve.openai_json import ChatRequest, ImageRequest

Handler = Callable[[Request], Awaitable[Response]]
Body = TypeVar("Body", bound=pydantic.BaseModel)
Result = TypeVar("Result")
OWNER = "emu_jax"
GONE = 499  # status of a client that disconnected; in metrics only


class ClientGone(Exception):
    """The client disconnected before the answer."""


def add_routes(app: FastAPI, engine: Engine, name: str, metrics: Metrics) -> None:
    """Adds the API of an engine, whose model is called `name`."""
    api = _Api(engine, name)
    routes: list[tuple[str, str, Handler]] = [
        ("GET", "/v1/models", api.models),
        ("GET", "/v1/models/{model:path}", api.model),
        ("POST", "/v1/chat/completions", api.chat),
        ("POST", "/v1/images/generations", api.images),
        ("GET", "/healthz", api.health),
    ]
    for method, path, handler in routes:
        app.router.add_route(path, _with_errors(handler, path, metrics), methods=[method])

    async def scrape(request: Request) -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    app.router.add_route("/metrics", scrape, methods=["GET"])

    async def unknown(request: Request) -> Response:
        return error_response(
            Refusal(404, f"{request.method} {request.url.path[:100]} is not served here", code="not_found")
        )

    app.router.add_route("/v1/{rest:path}", unknown, methods=["GET", "POST", "PUT", "DELETE", "PATCH"])


def _with_errors(handler: Handler, route: str, metrics: Metrics) -> Handler:
    """Wraps a handler: errors become responses in OpenAI's form, and requests are counted."""

    async def answered(request: Request) -> Response:
        with metrics.timed(route) as outcome:
            try:
                response = await handler(request)
            except ClientGone:
                response = Response(status_code=GONE)
            except Exception as error:  # `_refusal` re-raises unknown errors: a logged 500
                response = error_response(_refusal(error))
            outcome.status = response.status_code
        return response

    return answered


def _refusal(error: Exception) -> Refusal:
    """An error -> the refusal that the client gets."""
    match error:
        case Refusal():
            return error
        case pydantic.ValidationError():
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(str(part) for part in first["loc"])[:200]
            message = f"{where}: {first['msg']}" if where else first["msg"]
            return Refusal(400, message, code="invalid_value", parameter=where)
        case LimitError():
            return Refusal(400, str(error), code="invalid_value", parameter=error.parameter)
        case ContextError():
            return Refusal(400, str(error), code="context_length_exceeded", parameter="messages")
        case UserError():
            return Refusal(400, str(error), code="invalid_value")
        case Busy():
            return Refusal(429, str(error), kind="rate_limit_error", code="queue_full")
        case Stopping():
            return Refusal(503, str(error), kind="server_error", code="stopping")
        case TimeUp():
            return Refusal(504, str(error), kind="server_error", code="timeout")
        case Failed():
            return Refusal(500, str(error), kind="server_error", code="model_failed")
    raise error


class _Api:
    """The handlers."""

    def __init__(self, engine: Engine, name: str):
        self.engine, self.name = engine, name
        self.created = int(time.time())

    # ------------------------------------------------------------ models and health

    def _card(self) -> dict[str, Any]:
        return {"id": self.name, "object": "model", "created": self.created, "owned_by": OWNER}

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def model(self, request: Request) -> Response:
        self._check_model(request.path_params["model"])
        return JSONResponse(self._card())

    async def health(self, request: Request) -> Response:
        healthy = self.engine.healthy
        counts = {"waiting": self.engine.waiting(), "running": self.engine.running()}
        return JSONResponse({"status": "ok" if healthy else "broken", **counts}, 200 if healthy else 503)

    def _check_model(self, model: str | None) -> None:
        if model is not None and model != self.name:
            raise Refusal(
                404, f"the model {model[:100]!r} is not served here; there is {self.name!r}", code="model_not_found"
            )

    # ------------------------------------------------------------ chat

    async def chat(self, request: Request) -> Response:
        body = await _parse(ChatRequest, request)
        self._check_model(body.model)
        body.check(self.engine.limits)
        messages = await asyncio.to_thread(body.decode, self.engine.limits)
        ticket = await self.engine.chat(messages, body.settings())
        about = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": self.name}

        async def draw(text: str) -> Ticket[tuple[int, int], GeneratedImage]:
            return await self.engine.draw_answer(messages, text, body.drawing())

        if body.stream:
            usage = body.stream_options is not None and body.stream_options.include_usage
            events = _events(ticket, about, usage, draw if self.engine.draws else None)
            return StreamingResponse(events, media_type="text/event-stream", headers=NO_CACHE)
        completion = await _unless_gone(request, ticket)
        message: dict[str, Any] = {"role": "assistant", "content": completion.text, "refusal": None}
        if completion.ended_by == "image":
            if self.engine.draws:
                message["images"] = [_image_part(await _unless_gone(request, await draw(completion.text)))]
            else:
                message["refusal"] = UNDRAWN
        choice = {
            "index": 0,
            "message": message,
            "finish_reason": _reason(completion),
            "logprobs": None,
        }
        return JSONResponse({**about, "object": "chat.completion", "choices": [choice], "usage": _usage(completion)})

    # ------------------------------------------------------------ images

    async def images(self, request: Request) -> Response:
        body = await _parse(ImageRequest, request)
        self._check_model(body.model)
        decoder = self.engine.plain.decoder
        if decoder is None:
            raise UserError(
                "this model has no visual decoder; serve a folder with unet and vae in it, or name a decoder"
            )
        body.check(self.engine.limits, decoder.size)
        prompt = await asyncio.to_thread(body.decode, self.engine.limits)
        tickets: list[Ticket] = []
        try:
            for settings in body.settings():
                tickets.append(await self.engine.draw(prompt, settings))
            drawn = [await _unless_gone(request, ticket) for ticket in tickets]
        finally:
            for ticket in tickets:
                ticket.cancel()
        data = [{"b64_json": base64.b64encode(png(each.image)).decode(), "seed": each.seed} for each in drawn]
        return JSONResponse({"created": int(time.time()), "data": data})


NO_CACHE = {"cache-control": "no-cache", "x-accel-buffering": "no"}


async def _parse(kind: type[Body], request: Request) -> Body:
    body = await request.body()
    # Parsing megabytes of JSON here would block all other requests.
    return (
        await asyncio.to_thread(kind.model_validate_json, body)
        if len(body) > 100_000
        else kind.model_validate_json(body)
    )


async def _unless_gone(request: Request, ticket: Ticket[Any, Result]) -> Result:
    """A ticket's result; cancels the ticket if the client disconnects.

    Raises:
      ClientGone: the client disconnected.
    """

    async def disconnected() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    result, gone = asyncio.ensure_future(ticket.result()), asyncio.ensure_future(disconnected())
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


def _image_part(drawn: GeneratedImage) -> dict[str, Any]:
    """A drawn image as the content part that OpenAI's clients send; clients of other servers know `images` too."""
    data = base64.b64encode(png(drawn.image)).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}, "seed": drawn.seed}


def _reason(completion: Completion) -> str:
    return "length" if completion.ended_by == "length" else "stop"


def _usage(completion: Completion) -> dict[str, int]:
    return {
        "prompt_tokens": completion.prompt_tokens,
        "completion_tokens": completion.new_tokens,
        "total_tokens": completion.prompt_tokens + completion.new_tokens,
    }


async def _events(
    ticket: Ticket[str, Completion],
    about: dict[str, Any],
    usage: bool,
    draw: Callable[[str], Awaitable[Ticket[tuple[int, int], GeneratedImage]]] | None,
) -> AsyncIterator[bytes]:
    """Server-sent events of a chat completion; `draw` begins the image after a text, and is None without a decoder.

    The tickets are cancelled however the stream ends.
    """
    tickets: list[Ticket] = [ticket]

    def event(choices: list[dict[str, Any]], **more: Any) -> bytes:
        chunk = {**about, "object": "chat.completion.chunk", "choices": choices, **more}
        return b"data: " + json.dumps(chunk, ensure_ascii=False).encode() + b"\n\n"

    def choice(delta: dict[str, Any], reason: str | None = None) -> list[dict[str, Any]]:
        return [{"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}]

    try:
        yield event(choice({"role": "assistant", "content": ""}))
        async for piece in ticket:
            yield event(choice({"content": piece}))
        completion = await ticket.result()
        if completion.ended_by == "image":
            if draw is None:
                yield event(choice({"refusal": UNDRAWN}))
            else:
                tickets.append(drawing := await draw(completion.text))
                yield event(choice({"images": [_image_part(await drawing.result())]}))
        yield event(choice({}, _reason(completion)))
        if usage:
            yield event([], usage=_usage(completion))
        yield b"data: [DONE]\n\n"
    except (Busy, TimeUp, Failed, Stopping, UserError) as error:
        yield b"data: " + json.dumps(error_body(_refusal(error))).encode() + b"\n\n"
    finally:
        for each in tickets:
            each.cancel()
