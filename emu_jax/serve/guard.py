"""Checks of every request before any handler: the key, the origin, and the size of the body.

A request's body is read here completely before anything parses it: at most `Limits.body_bytes`, within
`Limits.upload_seconds`, with at most `Limits.body_seconds` between two pieces. Large bodies of all requests together
have at most `MAX_BODIES` times that size. So no handler or library behind it ever gets a body that is too large,
incomplete, or endless.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hmac
import json
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from emu_jax.serve.limits import MEGA, Limits

MAX_BODIES = 8  # bodies of the maximum size held at the same time
SMALL_BODY = 100_000  # bytes of a body that is read however many large ones are held
OPEN = ("/healthz",)  # needs no key
KEYED = ("/v1/", "/metrics", "/openapi.json")  # need the key in a header; the page has a login of its own
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
PAGE, UPLOAD = "/gradio_api/", "/gradio_api/upload"  # routes of the page; only uploads are not JSON
FORMS = ("/v1/images/edits", "/v1/images/variations")  # take files, as forms; all else of the API is JSON
MAX_PATH_BYTES = 2048  # of a path with its query


@dataclasses.dataclass(eq=False)
class Refusal(Exception):
    """A refused request, with the fields of its error response as OpenAI's clients expect them."""

    status: int
    message: str
    kind: str = "invalid_request_error"
    code: str | None = None
    parameter: str | None = None  # what the error is about


class Guard:
    """ASGI middleware.

    Args:
      key: the token required in `Authorization: Bearer …`; None: everyone on this machine is served.
      page_refuses: (JSON body sent to the page, Host header) -> the reason to refuse it, or None.
    """

    def __init__(
        self, app: ASGIApp, limits: Limits, key: str | None, page_refuses: Callable[[object, str], str | None]
    ):
        self.app, self.limits, self.key, self.page_refuses = app, limits, key, page_refuses
        self._held = 0  # bytes of all bodies in memory

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "websocket":  # not used here
                await send({"type": "websocket.close"})
                return
            await self.app(scope, receive, send)
            return
        body = b""
        try:
            self._check_head(scope)
            body = await self._read(scope, receive)
            self._check_body(scope, body)
        except Refusal as refusal:
            self._held -= len(body)
            response = error_response(refusal)
            response.headers["connection"] = "close"  # the rest of the body is not read
            await response(scope, receive, send)
            return
        try:
            await self.app(scope, _replay(body, receive), send)
        finally:
            self._held -= len(body)

    def _check_head(self, scope: Scope) -> None:
        headers = _headers(scope)
        if len(scope["path"]) + len(scope.get("query_string", b"")) > MAX_PATH_BYTES:
            raise Refusal(414, f"the address is longer than {MAX_PATH_BYTES} bytes")
        path = scope["path"]
        if any(character < " " for character in path):  # no route takes them
            raise Refusal(404, "the address has control characters; expected none", code="not_found")
        if self.key is None:
            # Pages of other sites, open in a browser on this machine, must not reach the server under any host name.
            host = headers.get("host", "").lower()
            name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
            if name not in LOOPBACK:
                raise Refusal(403, f"the Host header names {host[:100]!r}; without a key, only this machine is served")
            origin = headers.get("origin")
            if origin is not None and urlsplit(origin).netloc.lower() != host:
                raise Refusal(
                    403,
                    f"the request comes from a page of {origin[:100]!r}; only the server's own page may send requests",
                )
        elif path.startswith(KEYED) and path not in OPEN:
            scheme, _, given = headers.get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self.key.encode()):
                raise Refusal(
                    401,
                    "no key, or a wrong one; expected Authorization: Bearer and the server's key",
                    kind="authentication_error",
                    code="invalid_api_key",
                )
        length = headers.get("content-length")
        if length is not None and (not length.isdigit() or int(length) > self.limits.body_bytes):
            raise self._too_large()
        if path.startswith("/v1/") and scope["method"] == "POST":
            kind = headers.get("content-type", "").partition(";")[0].strip().lower()
            kinds = ["application/json", *(["multipart/form-data"] if path in FORMS else [])]
            if kind not in kinds:
                raise Refusal(415, f"the body is {kind[:100] or 'of no type'}; expected {' or '.join(kinds)}")

    def _too_large(self) -> Refusal:
        return Refusal(
            413, f"the body is too large; expected at most {self.limits.body_bytes // MEGA} MB", code="body_too_large"
        )

    async def _read(self, scope: Scope, receive: Receive) -> bytes:
        """Reads the whole body; if it is returned, `_held` counts it."""
        if scope["method"] in ("GET", "HEAD"):
            return b""
        pieces: list[bytes] = []
        count = 0
        clock = asyncio.get_running_loop().time
        end = clock() + self.limits.upload_seconds
        try:
            while True:
                message = await asyncio.wait_for(receive(), min(self.limits.body_seconds, end - clock()))
                if message["type"] != "http.request":
                    raise Refusal(400, "the connection was closed before the body was complete")
                piece = message.get("body", b"")
                count += len(piece)
                self._held += len(piece)
                if count > self.limits.body_bytes:
                    raise self._too_large()
                if count > SMALL_BODY and self._held > MAX_BODIES * self.limits.body_bytes:
                    raise Refusal(429, "too many large bodies are being sent; try again in a few seconds")
                pieces.append(piece)
                if not message.get("more_body", False):
                    return b"".join(pieces)
        except TimeoutError:
            self._held -= count
            if clock() >= end:
                raise Refusal(408, f"the body is incomplete after {self.limits.upload_seconds:g} s") from None
            raise Refusal(
                408, f"the body is incomplete, and none of it arrived for {self.limits.body_seconds:g} s"
            ) from None
        except BaseException:
            self._held -= count
            raise

    def _check_body(self, scope: Scope, body: bytes) -> None:
        """Requests to the page may name files, which must be the page's own."""
        if not scope["path"].startswith(PAGE) or scope["path"].startswith(UPLOAD) or not body:
            return
        try:
            payload = json.loads(body)
        except (ValueError, RecursionError):
            raise Refusal(400, "the body is not JSON") from None
        try:
            reason = self.page_refuses(payload, _headers(scope).get("host", ""))
        except RecursionError:
            reason = "the body is nested too deeply"
        if reason is not None:
            raise Refusal(400, reason)


def _headers(scope: Scope) -> dict[str, str]:
    return {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}


def _replay(body: bytes, receive: Receive) -> Receive:
    """Replays a body, then passes on further messages, such as the client's disconnection."""
    sent = False

    async def again() -> Message:
        nonlocal sent
        if not sent:
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return again


def error_body(refusal: Refusal) -> dict[str, Any]:
    """{"error": …}, in the form of OpenAI's API."""
    error = {"message": refusal.message, "type": refusal.kind, "param": refusal.parameter, "code": refusal.code}
    return {"error": error}


def error_response(refusal: Refusal) -> JSONResponse:
    """The response to a refused request."""
    headers = {"retry-after": "2"} if refusal.status in (429, 503) else None
    return JSONResponse(error_body(refusal), refusal.status, headers=headers)
