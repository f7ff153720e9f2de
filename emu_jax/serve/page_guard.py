"""Guards against requests that make the page's library fetch an address, or serve a file that is not the page's.

Gradio 6 reads files and addresses in these cases; the first four would make this server fetch what a client names:

    POST queue/join, run, call   {"path": "https://…"} of a file, anywhere in the inputs, is downloaded
    POST queue/join, run, call   {"component": …, "constructor_args": …} in a chat builds any component from any value
    GET  file=https://…          is fetched and passed on
    GET  proxy=https://…         is fetched and passed on, for hosts of Hugging Face
    POST queue/join, run, call   {"path": "/etc/passwd"} without gradio's type mark is not checked by all inputs
    {"url": "data:…"}            is decoded, whatever its size
    {"url": "https://…"}         in an answer is loaded by the browser

`refuses` checks bodies. `Filter` checks everything else: it passes only the few routes that the page needs, and its
headers forbid browsers to load anything from other sites.
"""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import unquote, urlsplit

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

API = "/gradio_api"
FILE = f"{API}/file="
NAMES = ("path", "url")  # keys of a file in gradio's payloads
PAGE = {  # method -> paths
    "GET": {"/", "/config", "/theme.css", "/favicon.ico", "/manifest.json", "/login_check", "/logout"}
    | {f"{API}/{name}" for name in ("queue/data", "upload_progress", "startup-events", "app_id", "user", "login_check")}
    | {f"{API}/{name}" for name in ("info", "token")},
    "POST": {"/login", *(f"{API}/{name}" for name in ("queue/join", "run/predict", "upload", "cancel", "reset"))},
}
PREFIXES = ("/assets/", "/static/", f"{API}/heartbeat/")  # GET
# Gradio's scripts are inline and use `new Function`; its styles are inline too.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; "
    "worker-src 'self' blob:; frame-src 'none'; frame-ancestors 'none'; object-src 'none'; form-action 'self'; "
    "base-uri 'self'"
)
HEADERS = (
    (b"content-security-policy", POLICY.encode()),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
)


def refuses(payload: object, host: str = "") -> str | None:
    """The reason, in one line, to refuse a JSON body sent to the page; None to accept it.

    Args:
      host: the request's Host header, which addresses of files must have; "" accepts any host.
    """
    if isinstance(payload, dict):
        if "constructor_args" in payload:
            return "constructor_args: the page takes only texts, numbers and files"
        for name in NAMES:
            value = payload.get(name)
            if isinstance(value, str) and value and (reason := _refuses_file(name, value, host)):
                return reason
            if name in payload and not (value is None or isinstance(value, str)) and "meta" in payload:
                return f"{name}: expected a text"
    if isinstance(payload, dict | list):
        for part in payload.values() if isinstance(payload, dict) else payload:
            if reason := refuses(part, host):
                return reason
    return None


def _refuses_file(name: str, value: str, host: str) -> str | None:
    shown = repr(value[:80])
    if name == "url":
        parts = urlsplit(value)
        if parts.scheme not in ("", "http", "https") or (parts.netloc and host and parts.netloc != host):
            return f"url {shown}: expected the address of a file that was uploaded here"
        if parts.netloc == "" and (parts.scheme or value.startswith("//")):
            return f"url {shown}: expected the address of a file that was uploaded here"
        _, found, value = parts.path.partition(FILE)
        if not found or parts.query or parts.fragment:
            return f"url {shown}: expected the address of a file that was uploaded here"
        value = unquote(value)
    return None if is_own_file(value) else f"{name} {shown}: expected a file that was uploaded here"


def is_own_file(path: str) -> bool:
    """Whether an absolute path is inside the folder of the page's files, with links resolved."""
    folder = os.environ.get("GRADIO_TEMP_DIR")
    if not folder or "\0" in path or not os.path.isabs(path):
        return False
    return Path(folder).resolve() in Path(path).resolve().parents


class Filter:
    """ASGI middleware: serves only the page's routes and files, and sets headers that block other sites' content."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                ours = {name for name, _ in HEADERS}
                kept = [(name, value) for name, value in message.get("headers", []) if name.lower() not in ours]
                message = {**message, "headers": [*kept, *HEADERS]}
            await send(message)

        serves = _serves(scope["method"], scope["path"])
        app: ASGIApp = self.app if serves else JSONResponse({"detail": "Not Found"}, 404)
        await app(scope, receive, with_headers)


def _serves(method: str, path: str) -> bool:
    if method in ("GET", "HEAD"):
        if path.startswith(FILE):
            return is_own_file(path.removeprefix(FILE))
        return path in PAGE["GET"] or path.startswith(PREFIXES)
    return path.rstrip("/") in PAGE.get(method, ())
