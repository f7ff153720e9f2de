"""Connections that cannot be held for ever, however slowly a client writes or reads.

    a connection ─ head ──────────────▶ body ────────▶ answer ─────────────▶ the next head, or the end
                   Limits.head_seconds   guard.py       answer_seconds        uvicorn's keep-alive, 5 s
                                                        a half-closed one: half_closed_seconds

uvicorn bounds a head's size, not its time, and waits for ever until a client reads its answer. A client that only stops
sending (a half-closed connection) is answered still. It looks like one that has left until something is sent to it, so
its answer has to begin soon, as a stream's does.
"""

from __future__ import annotations

import asyncio
import functools
import json
import sys
from collections.abc import Callable
from typing import Any, cast

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from emu_jax.serve.guard import Refusal, error_body
from emu_jax.serve.limits import Limits

MIN_PIECE = 16_384  # bytes of an answer that a client has to read within `Limits.answer_seconds`


def bounded_connections(limits: Limits) -> Callable[..., asyncio.Protocol]:
    """What `uvicorn.Config.http` takes: connections of one server within its limits."""
    idle: dict[BoundedConnection, None] = {}
    return functools.partial(BoundedConnection, limits=limits, most=most_connections(limits), idle=idle)


def most_connections(limits: Limits) -> int:
    """`Limits.connections`, or half of the files that this process may open if that is less."""
    if sys.platform == "win32":
        return limits.connections
    import resource

    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return limits.connections if files == resource.RLIM_INFINITY else min(limits.connections, files // 2)


class BoundedConnection(H11Protocol):
    """uvicorn's connection with deadlines.

    Args:
      most: number of connections; above it the one is closed that has waited for a head the longest.
      idle: those that wait for a head, the longest first; all connections of a server share it.
    """

    def __init__(self, *arguments: Any, limits: Limits, most: int, idle: dict[BoundedConnection, None], **named: Any):
        super().__init__(*arguments, **named)
        self._limits, self._most, self._idle = limits, most, idle
        self._half_closed = False
        self._unsent = 0  # bytes of the answer at the last look
        self._timers: dict[str, asyncio.TimerHandle] = {}

    # ------------------------------------------------------------ uvicorn's events

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(cast(asyncio.Transport, transport))
        self._idle[self] = None
        self._start("head", self._limits.head_seconds, self._end_head)
        if len(self.connections) > self._most:
            next(iter(self._idle)).transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._idle.pop(self, None)
        for name in list(self._timers):
            self._stop(name)

    def data_received(self, data: bytes) -> None:
        if "head" not in self._timers and self.conn.their_state is h11.IDLE:
            self._start("head", self._limits.head_seconds, self._end_head)
        super().data_received(data)
        self._look_at_head()

    def eof_received(self) -> bool:  # type: ignore[override]
        """Whether the connection stays open to be written to."""
        answering = self.cycle is not None and not self.cycle.response_complete
        if not answering or self.conn.their_state is h11.SEND_BODY:
            return False
        self._half_closed = True
        self._start("half-closed", self._limits.half_closed_seconds, self._end_half_closed)
        return True

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_answer()

    def on_response_complete(self) -> None:
        super().on_response_complete()  # may begin with a request that was sent with the last one
        if self.transport.is_closing() or self._half_closed:
            self.transport.close()
        elif self.conn.their_state is h11.IDLE:
            self._idle[self] = None
            if self.conn.trailing_data[0]:
                self._start("head", self._limits.head_seconds, self._end_head)
        self._watch_answer()

    # ------------------------------------------------------------ deadlines

    def _start(self, name: str, seconds: float, then: Callable[[], None]) -> None:
        self._stop(name)
        self._timers[name] = self.loop.call_later(seconds, then)

    def _stop(self, name: str) -> None:
        if timer := self._timers.pop(name, None):
            timer.cancel()

    def _look_at_head(self) -> None:
        """Ends its deadline once it is complete."""
        if self.conn.their_state is not h11.IDLE:
            self._stop("head")
            self._idle.pop(self, None)

    def _end_head(self) -> None:
        seconds = self._limits.head_seconds
        refusal = Refusal(408, f"the head of the request is incomplete after {seconds:g} s", code="timeout")
        body = json.dumps(error_body(refusal)).encode()
        head = f"HTTP/1.1 408 \r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close"
        if self.conn.our_state is h11.IDLE and not self.transport.is_closing():
            self.transport.write(head.encode() + b"\r\n\r\n" + body)
        self.transport.close()
        self._watch_answer()

    def _watch_answer(self) -> None:
        """Looks from time to time whether the client reads what is still unsent."""
        self._unsent = self.transport.get_write_buffer_size()
        if self._unsent and "answer" not in self._timers:
            self._start("answer", self._limits.answer_seconds, self._look_at_answer)

    def _look_at_answer(self) -> None:
        self._stop("answer")
        unsent = self.transport.get_write_buffer_size()
        nothing_is_added = self.flow.write_paused or self.transport.is_closing() or self.cycle is None
        if nothing_is_added and unsent > self._unsent - MIN_PIECE:
            self.transport.abort()
        self._watch_answer()

    def _end_half_closed(self) -> None:
        """Ends a half-closed connection that nothing was sent to yet: sending shows whether the client has left."""
        if self.cycle is not None and not self.cycle.response_started:
            self.transport.abort()
