"""An HTTP API compatible with OpenAI's clients, and /healthz, /metrics and /openapi.json.

GET  /v1/models   /v1/models/NAME
POST /v1/chat/completions       text and images (data URLs); streaming; an image that the answer begins is drawn
POST /v1/responses              the same as OpenAI's newer API has it; nothing is stored
POST /v1/completions            texts, continued by the model without adapters; streaming
POST /v1/embeddings             images, and the images that texts ask for, as the model's visual embeddings
POST /v1/images/generations     b64_json; JSON
POST /v1/images/edits           images and a prompt, blended; a form or JSON. /v1/images/variations: the same
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Sequence
from typing import Any, TypeVar

import numpy as np
import pydantic
from fastapi import FastAPI
from jaxtyping import Float
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from emu_jax.errors import UserError
from emu_jax.serve.choices import ChatChoice, Choice, Draw, TextChoice
from emu_jax.serve.downloads import png
from emu_jax.serve.encoded_prompt import ContextError, Message
from emu_jax.serve.engine import Engine
from emu_jax.serve.forms import read_form
from emu_jax.serve.guard import Refusal, error_body, error_response
from emu_jax.serve.limits import LimitError
from emu_jax.serve.metrics import Metrics
from emu_jax.serve.openai_json import (
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
    ImageRequest,
    to_messages,
)
from emu_jax.serve.openapi import document
from emu_jax.serve.parts import FileField, ImageField, decode_parts
from emu_jax.serve.responses import ResponseAnswer, ResponseRequest
from emu_jax.serve.settings import DrawSettings
from emu_jax.serve.ticket import Busy, Failed, Stopping, Ticket, TimeUp

Handler = Callable[[Request], Awaitable[Response]]
Body = TypeVar("Body", bound=pydantic.BaseModel)
Result = TypeVar("Result")
OWNER = "emu_jax"
METHODS = ["GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"]
GONE = 499  # status of a client that disconnected; in metrics only


class ClientGone(Exception):
    """The client disconnected before the answer."""


def add_routes(app: FastAPI, engine: Engine, name: str, metrics: Metrics) -> None:
    """Adds the API of an engine, whose model is called `name`."""
    api = _Api(engine, name)
    routes: list[tuple[str, str, Handler, str | None]] = [  # the last: the field that holds texts and images
        ("GET", "/v1/models", api.models, None),
        ("GET", "/v1/models/{model:path}", api.model, "model"),
        ("POST", "/v1/chat/completions", api.chat, "messages"),
        ("POST", "/v1/responses", api.responses, "input"),
        ("POST", "/v1/completions", api.completions, "prompt"),
        ("POST", "/v1/embeddings", api.embeddings, "input"),
        ("POST", "/v1/images/generations", api.images, "prompt"),
        ("POST", "/v1/images/edits", api.edits, "image"),
        ("POST", "/v1/images/variations", api.edits, "image"),
        ("GET", "/healthz", api.health, None),
    ]
    for method, path, handler, subject in routes:
        app.router.add_route(path, _with_errors(handler, path, metrics, subject), methods=[method])

    async def scrape(request: Request) -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    app.router.add_route("/metrics", scrape, methods=["GET"])
    decoder = engine.plain.decoder
    page = json.dumps(document(name, engine.limits, None if decoder is None else decoder.size), ensure_ascii=False)

    async def openapi(request: Request) -> Response:
        return Response(page, media_type="application/json")

    app.router.add_route("/openapi.json", openapi, methods=["GET"])
    served = {path: method for method, path, *_ in routes} | {"/metrics": "GET", "/openapi.json": "GET"}

    async def unknown(request: Request) -> Response:
        path = request.url.path
        known = served.get(path) or ("GET" if path.startswith("/v1/models/") else None)
        if known is None:
            return error_response(Refusal(404, f"{request.method} {path[:100]} is not served here", code="not_found"))
        refusal = Refusal(405, f"{path[:100]} is not served by {request.method}; expected {known}", code="not_allowed")
        response = error_response(refusal)
        response.headers["allow"] = known
        return response

    for path in ("/v1/{rest:path}", "/metrics", "/openapi.json", "/healthz"):
        app.router.add_route(path, unknown, methods=METHODS)


def _with_errors(handler: Handler, route: str, metrics: Metrics, subject: str | None) -> Handler:
    """Wraps a handler: errors become responses in OpenAI's form, and requests are counted.

    Args:
      subject: the field that errors are about, if they do not name another.
    """

    async def answered(request: Request) -> Response:
        with metrics.timed(route) as outcome:
            try:
                response = await handler(request)
            except ClientGone:
                response = Response(status_code=GONE)
            except Exception as error:  # `_refusal` re-raises unknown errors: a logged 500
                response = error_response(_refusal(error, subject))
            outcome.status = response.status_code
        return response

    return answered


def _refusal(error: Exception, subject: str | None) -> Refusal:
    """An error -> the refusal that the client gets; `subject` as in `_with_errors`."""
    match error:
        case Refusal():
            return error
        case pydantic.ValidationError():
            return _of_validation(error)
        case LimitError():
            return Refusal(400, str(error), code="invalid_value", parameter=error.parameter)
        case ContextError():
            return Refusal(400, str(error), code="context_length_exceeded", parameter=subject)
        case UserError():
            return Refusal(400, str(error), code="invalid_value", parameter=subject)
        case Busy():
            return Refusal(429, str(error), kind="rate_limit_error", code="queue_full")
        case Stopping():
            return Refusal(503, str(error), kind="server_error", code="stopping")
        case TimeUp():
            return Refusal(504, str(error), kind="server_error", code="timeout")
        case Failed():
            return Refusal(500, str(error), kind="server_error", code="model_failed")
    raise error


def _of_validation(error: pydantic.ValidationError) -> Refusal:
    """The first error about a body's fields, with its place as "messages[0].role"."""
    first = error.errors(include_url=False, include_input=False)[0]
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"])[1:201]
    if first["type"] == "json_invalid":
        return Refusal(400, f"the body is not JSON ({first['ctx']['error']})", code="invalid_value")
    if first["type"] == "missing":
        return Refusal(400, f"{where} is missing", code="missing_required_parameter", parameter=where)
    return Refusal(400, f"{where or 'the body'}: {first['msg']}", code="invalid_value", parameter=where or None)


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
                404,
                f"the model {model[:100]!r} is not served here; there is {self.name!r}",
                code="model_not_found",
                parameter="model",
            )

    async def _decode(
        self, request: Request, parts: Sequence[Sequence[str | ImageField | FileField]]
    ) -> list[list[str | np.ndarray]]:
        """`decode_parts`, unless the client disconnects before: images may wait for a decoder."""
        return await _unless_gone(request, decode_parts(self.engine, parts))

    # ------------------------------------------------------------ texts

    async def chat(self, request: Request) -> Response:
        body = await _parse(ChatRequest, request)
        self._check_model(body.model)
        read = body.read(self.engine.limits)
        contents = await self._decode(request, [parts for _, parts in read])
        messages = to_messages([role for role, _ in read], contents)
        settings = [body.settings().following(number) for number in range(body.count)]
        tickets = await _submit(self.engine.chat(messages, each) for each in settings)
        choices = [
            ChatChoice(
                number,
                ticket,
                self._spell,
                body.top_logprobs or 0,
                self._drawer(messages, body.drawing().following(number)),
            )
            for number, ticket in enumerate(tickets)
        ]
        return await self._respond(request, body, "chatcmpl", choices)

    def _drawer(self, messages: Sequence[Message], settings: DrawSettings) -> Draw | None:
        """What draws the image that an answer begins after its text."""
        return (lambda text: self.engine.draw_answer(messages, text, settings)) if self.engine.draws else None

    async def responses(self, request: Request) -> Response:
        body = await _parse(ResponseRequest, request)
        self._check_model(body.model)
        read = body.read(self.engine.limits)
        contents = await self._decode(request, [parts for _, parts in read])
        messages = to_messages([role for role, _ in read], contents)
        ticket = await self.engine.chat(messages, body.settings())
        draw = self._drawer(messages, body.drawing())
        answer = ResponseAnswer(0, ticket, self._spell, draw=draw, body=body, model=self.name)
        if body.stream:
            return StreamingResponse(_response_events(answer), media_type="text/event-stream", headers=NO_CACHE)
        try:
            return JSONResponse(await _unless_gone(request, answer.whole()))
        finally:
            answer.cancel()

    async def completions(self, request: Request) -> Response:
        body = await _parse(CompletionRequest, request)
        self._check_model(body.model)
        prompts = await self._decode(request, body.read(self.engine.limits))
        settings = [body.settings().following(number) for number in range(body.count)]
        tickets = await _submit(self.engine.complete(prompt, each) for prompt in prompts for each in settings)
        choices = [TextChoice(number, ticket, self._spell, body.logprobs or 0) for number, ticket in enumerate(tickets)]
        return await self._respond(request, body, "cmpl", choices)

    def _spell(self, id: int) -> tuple[str, bytes]:
        return self.engine.plain.tokenizer.piece(id)

    async def _respond(
        self, request: Request, body: ChatRequest | CompletionRequest, kind: str, choices: Sequence[Choice]
    ) -> Response:
        """The choices, one choice's text for each ticket, as one body or as a stream."""
        about = {"id": f"{kind}-{uuid.uuid4().hex}", "created": int(time.time()), "model": self.name}
        if body.stream:
            count = body.count if body.usage else None
            events = _events(choices, about, count, "messages" if kind == "chatcmpl" else "prompt")
            return StreamingResponse(events, media_type="text/event-stream", headers=NO_CACHE)
        try:
            whole = [await _unless_gone(request, choice.whole()) for choice in choices]
        finally:
            for choice in choices:
                choice.cancel()
        usage = _usage(choices, body.count)
        return JSONResponse({**about, "object": choices[0].object, "choices": whole, "usage": usage})

    # ------------------------------------------------------------ embeddings

    async def embeddings(self, request: Request) -> Response:
        body = await _parse(EmbeddingRequest, request)
        self._check_model(body.model)
        inputs = await self._decode(request, body.read(self.engine.limits))
        tickets = await _submit(self.engine.embed(each) for each in inputs)
        try:
            embedded = [await _unless_gone(request, ticket.result()) for ticket in tickets]
        finally:
            for ticket in tickets:
                ticket.cancel()
        content = await asyncio.to_thread(self._embeddings, body, embedded)
        return Response(content, media_type="application/json")

    def _embeddings(self, body: EmbeddingRequest, embedded: Sequence[Float[np.ndarray, "Q D"]]) -> bytes:
        data = []
        for index, each in enumerate(embedded):
            vectors = each.mean(0, keepdims=True) if body.pooling == "mean" else each
            flat = np.ascontiguousarray(vectors, "<f4").reshape(-1)
            encoded = base64.b64encode(flat.tobytes()).decode() if body.encoding_format == "base64" else flat.tolist()
            data.append({"object": "embedding", "index": index, "embedding": encoded, "shape": list(vectors.shape)})
        usage = {"prompt_tokens": 0, "total_tokens": 0}
        return json.dumps({"object": "list", "data": data, "model": self.name, "usage": usage}).encode()

    # ------------------------------------------------------------ images

    async def images(self, request: Request) -> Response:
        body = await _parse(ImageRequest, request)
        return await self._draw(request, body, [])

    async def edits(self, request: Request) -> Response:
        """Images and a prompt: the model draws what follows them, as it blends images and draws in context."""
        if "multipart" in request.headers.get("content-type", ""):
            fields, files = await read_form(request, self.engine.limits)
            body = ImageRequest.model_validate(fields, strict=False)  # every value is a text
        else:
            body, files = await _parse(ImageRequest, request), []
        if not files and not body.images:
            raise LimitError("image", "there is no image; expected one or more files named image (or image[])")
        return await self._draw(request, body, files)

    async def _draw(self, request: Request, body: ImageRequest, files: Sequence[FileField | ImageField]) -> Response:
        self._check_model(body.model)
        limits, decoder = self.engine.limits, self.engine.plain.decoder
        if decoder is None:
            raise Refusal(
                400,
                "this model has no visual decoder; serve a folder with unet and vae in it, or name a decoder",
                code="unsupported_model",
                parameter="model",
            )
        images = [*files, *body.read(limits, decoder.size)]
        limits.check_images(len(images))
        (prompt,) = await self._decode(request, [[*images, *([body.prompt] if body.prompt else [])]])
        tickets = await _submit(self.engine.draw(prompt, settings) for settings in body.settings())
        try:
            drawn = [await _unless_gone(request, ticket.result()) for ticket in tickets]
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


async def _submit(requests: Iterable[Awaitable[Ticket[Any, Result]]]) -> list[Ticket[Any, Result]]:
    """Submits the requests of one client, all or none."""
    tickets: list[Ticket[Any, Result]] = []
    try:
        for each in requests:
            tickets.append(await each)
    except BaseException:
        for ticket in tickets:
            ticket.cancel()
        raise
    return tickets


async def _unless_gone(request: Request, answer: Awaitable[Result]) -> Result:
    """What an answer returns, unless the client disconnects before.

    Raises:
      ClientGone: the client disconnected.
    """

    async def disconnected() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    result, gone = asyncio.ensure_future(answer), asyncio.ensure_future(disconnected())
    try:
        await asyncio.wait({result, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not result.done():
            raise ClientGone
        return result.result()
    finally:
        for task in (result, gone):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task


def _usage(choices: Sequence[Choice], count: int) -> dict[str, int]:
    """Tokens of finished choices; `count` of them share a prompt."""
    prompt_tokens = sum(choice.completion.prompt_tokens for choice in choices[::count])
    new_tokens = sum(choice.completion.new_tokens for choice in choices)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": new_tokens,
        "total_tokens": prompt_tokens + new_tokens,
    }


async def _events(
    choices: Sequence[Choice], about: dict[str, Any], count: int | None, subject: str
) -> AsyncIterator[bytes]:
    """Server-sent events of all choices as they come. Their tickets are cancelled however the stream ends.

    Args:
      count: as in `_usage`, which is sent at the end; None: it is not. subject: as in `_with_errors`.
    """

    def event(found: list[dict[str, Any]], **more: Any) -> bytes:
        chunk = {**about, "object": choices[0].chunk, "choices": found, **more}
        return b"data: " + json.dumps(chunk, ensure_ascii=False).encode() + b"\n\n"

    try:
        async with contextlib.aclosing(_merged([choice.chunks() for choice in choices])) as chunks:
            async for chunk in chunks:
                yield event([chunk])
        if count is not None:
            yield event([], usage=_usage(choices, count))
        yield b"data: [DONE]\n\n"
    except (Busy, TimeUp, Failed, Stopping, UserError) as error:
        yield b"data: " + json.dumps(error_body(_refusal(error, subject))).encode() + b"\n\n"
    finally:
        for choice in choices:
            choice.cancel()


async def _response_events(answer: ResponseAnswer) -> AsyncIterator[bytes]:
    """Server-sent events of a response, each with its name. Its tickets are cancelled however the stream ends."""
    sent = 0
    try:
        async for event in answer.events():
            sent += 1
            yield f"event: {event['type']}\ndata: {json.dumps(event, ensure_ascii=False)}\n\n".encode()
    except (Busy, TimeUp, Failed, Stopping, UserError) as error:
        refusal = _refusal(error, "input")
        error_fields = {"code": refusal.code, "message": refusal.message, "param": refusal.parameter}
        event = {"type": "error", "sequence_number": sent, **error_fields}
        yield f"event: error\ndata: {json.dumps(event)}\n\n".encode()
    finally:
        answer.cancel()


async def _merged(streams: Sequence[AsyncIterator[Result]]) -> AsyncGenerator[Result, None]:
    """Items of several streams in the order in which they come; an error of one ends all."""
    queue: asyncio.Queue[Any] = asyncio.Queue(maxsize=1)
    end = object()

    async def drain(stream: AsyncIterator[Result]) -> None:
        try:
            async for item in stream:
                await queue.put(item)
        except Exception as error:  # raised again by the reader of the queue
            await queue.put(error)
        else:
            await queue.put(end)

    tasks = [asyncio.create_task(drain(stream)) for stream in streams]
    try:
        left = len(tasks)
        while left:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is end:
                left -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
