"""The server: loads a checkpoint and serves the page, the HTTP API, /healthz and /metrics until it is stopped."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import ipaddress
import logging
import os
import pathlib
import re
import signal
import socket
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping

import uvicorn
from fastapi import FastAPI

from emu_jax.checkpoints.shipped import DEFAULT, model_path
from emu_jax.errors import UserError
from emu_jax.generate.model import Emu
from emu_jax.serve import api
from emu_jax.serve.connections import bounded_connections
from emu_jax.serve.engine import Engine
from emu_jax.serve.guard import Guard
from emu_jax.serve.limits import Limits
from emu_jax.serve.metrics import Metrics
from emu_jax.storage import Path, absolute

log = logging.getLogger(__name__)

KEY_VARIABLE = "EMU_JAX_API_KEY"
MIN_KEY_LENGTH = 16  # characters
STOP_SECONDS = 10  # time for running requests to end when the server stops
MAX_HEAD_BYTES = 64 * 1024  # of a request's first line and headers


@dataclasses.dataclass(frozen=True)
class Options:
    """Settings of a server.

    Attributes:
      checkpoint: as in `Emu.load`, by default the model in the box. If it has a tuned model in its folder `chat`, both
        are served.
      tokenizer, decoder, weights, safety_checker, mesh: as in `Emu.load`.
      name: the model's name in the API; by default the folder's.
      key: required of every client; None serves only this machine.
      page: whether the web page is served.
    """

    checkpoint: Path | None = None
    host: str = "127.0.0.1"
    port: int = 7860
    key: str | None = None
    name: str | None = None
    tokenizer: Path | None = None
    decoder: Path | None = None
    weights: str = "auto"
    safety_checker: bool = True
    mesh: Mapping[str, int] | None = None
    page: bool = True
    limits: Limits = dataclasses.field(default_factory=Limits)

    def __post_init__(self):
        if self.key is not None and (
            len(self.key) < MIN_KEY_LENGTH or not self.key.isascii() or not self.key.isprintable()
        ):
            raise UserError(
                f"the key has {len(self.key)} characters; expected at least {MIN_KEY_LENGTH}, of printable ASCII"
            )
        if self.key is None and not is_loopback(self.host):
            raise UserError(
                f"host={self.host} is visible to other machines: a key is needed; put {MIN_KEY_LENGTH} or more letters "
                f"into {KEY_VARIABLE}, e.g. by `openssl rand -hex 16`"
            )
        if not 0 <= self.port <= 65535:
            raise UserError(f"port={self.port}; expected 0 to 65535 (0: any free port)")
        if self.name is not None and not re.fullmatch(r"[\w.:/-]{1,100}", self.name, re.ASCII):
            raise UserError(f"name={self.name[:100]!r}; expected 1 to 100 letters, digits and any of . : / - _")

    @property
    def folder(self) -> Path:
        """The folder or file to serve.

        Raises:
          UserError: no checkpoint was given, and this installation carries no model.
        """
        return model_path(DEFAULT) if self.checkpoint is None else self.checkpoint

    @property
    def model_name(self) -> str:
        """The model's name in the API."""
        return self.name or re.sub(r"[^\w.:-]", "-", absolute(self.folder).name, flags=re.ASCII)[:100] or "emu"


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def body_seconds(host: str) -> float:
    """Maximum pause within a body: programs on this machine do not pause, distant phones may.

    >>> body_seconds("127.0.0.1"), body_seconds("0.0.0.0")
    (0.9, 10.0)
    """
    return 0.9 if is_loopback(host) else 10.0


def load(options: Options) -> Emu:
    """The model; UserError where there is none, or its parts do not fit."""
    return Emu.load(
        options.folder,
        tokenizer=options.tokenizer,
        tuned=True,
        decoder=options.decoder,
        safety_checker=options.safety_checker,
        mesh=options.mesh,
        weights=options.weights,
    )


def make_app(engine: Engine, options: Options, folder: pathlib.Path) -> Callable:
    """The ASGI application of an engine; the page stores uploads only in `folder`."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await asyncio.to_thread(engine.decoders.start)
        yield
        await asyncio.to_thread(engine.close, STOP_SECONDS)

    app = FastAPI(title="emu_jax", openapi_url=None, docs_url=None, redoc_url=None, lifespan=lifespan)
    api.add_routes(app, engine, options.model_name, Metrics(engine))
    if not options.page:
        return Guard(app, options.limits, options.key, lambda payload, host: "this server has no page")
    from emu_jax.serve import page, page_guard

    app = page.mount(app, engine, options.model_name, options.key, folder)
    return Guard(app, options.limits, options.key, page_guard.refuses)


def web_config(app: Callable, limits: Limits) -> uvicorn.Config:
    """How uvicorn serves an application within the limits of connections."""
    return uvicorn.Config(
        app,
        log_level="warning",
        server_header=False,
        timeout_graceful_shutdown=STOP_SECONDS,
        h11_max_incomplete_event_size=MAX_HEAD_BYTES,
        http=bounded_connections(limits),  # type: ignore[arg-type]  # called as a class is
        ws="none",
    )


def serve(options: Options, ready: Callable[[str], None] | None = None) -> None:
    """Serves until SIGTERM or Ctrl-C; running requests then have ten seconds to end.

    Args:
      ready: called with the address once the server accepts requests.

    Raises:
      UserError: the server cannot listen at the address, or there is no model; before anything is compiled.
    """
    listener = _listen(options.host, options.port)
    with listener, _Signals() as signals, tempfile.TemporaryDirectory(prefix="emu-jax-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # read when gradio is imported
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        engine = Engine(load(options), options.limits)
        # Before the engine's thread starts: the page imports packages that replace Python's import for a moment (lazy
        # imports of etils), and what JAX imports meanwhile in the other thread would be a proxy.
        app = make_app(engine, options, pathlib.Path(folder))
        signals.hold()  # nothing may interrupt the start of a thread
        try:  # from here on the engine's thread has to end first, whatever happens
            log.info("compiling; the first requests wait for what they need")
            engine.start()
            signals.release()
            server = _Server(web_config(app, options.limits), listener.getsockname(), ready)
            # uvicorn stops gracefully, then raises the signal again.
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda *_: None)
            server.run(sockets=[listener])
        finally:
            engine.close(0)


class _Signals:
    """Until uvicorn runs, SIGTERM and SIGINT raise KeyboardInterrupt, so that files are removed.

    Python drops an exception that is raised while it collects garbage, where JAX has a callback; `hold` raises it
    again.
    """

    def __enter__(self) -> _Signals:
        self._asked = self._held = False
        self._before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        for number in self._before:
            signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def hold(self) -> None:
        """Keeps further signals for `release`; raises KeyboardInterrupt if one came before."""
        self._held = True
        self._raise()

    def release(self) -> None:
        """Raises KeyboardInterrupt if a signal came meanwhile, and for those to come."""
        self._held = False
        self._raise()

    def _raise(self) -> None:
        if self._asked:
            raise KeyboardInterrupt

    def _handle(self, number: int, frame: object) -> None:
        self._asked = True
        if not self._held:
            raise KeyboardInterrupt


class _Server(uvicorn.Server):
    """Calls `ready` once it listens."""

    def __init__(self, config: uvicorn.Config, address: tuple, ready: Callable[[str], None] | None):
        super().__init__(config)
        self._address, self._ready = address, ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        host, port = self._address[:2]
        if self._ready is not None:
            self._ready(f"http://{f'[{host}]' if ':' in host else host}:{port}")


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise UserError(f"host={host}: no such address ({error.strerror})") from error
    try:
        if sys.platform != "win32":
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(1024)
    except OSError as error:
        listener.close()
        raise UserError(f"port={port}: cannot listen at {host} ({error.strerror}); choose another") from error
    return listener
