"""A request as its caller sees it: a ticket with events and a result, and the errors that end it.

the caller, in its event loop ──cancel──▶ Ticket ◀──events, result, error── the engine's thread
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, Generic, TypeVar

Event = TypeVar("Event")  # emitted while a request runs
Result = TypeVar("Result")


class Busy(Exception):
    """The queue is full."""


class Stopping(Exception):
    """The server is stopping, and refuses or cancels the request."""


class TimeUp(Exception):
    """The request exceeded `Limits.seconds`."""


class Failed(Exception):
    """The model failed; the reason is in the log."""


class Ticket(Generic[Event, Result]):
    """A waiting or running request: `async for event in ticket` follows it, `await ticket.result()` waits for its end.

    A caller that stops waiting must call `cancel`, which frees the request's slot.
    """

    def __init__(self, seconds: float):
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event | None] = asyncio.Queue()
        self._end: asyncio.Future[Result] = self._loop.create_future()
        self._end.add_done_callback(lambda end: end.cancelled() or end.exception())  # the result need not be awaited
        self.submitted = time.monotonic()
        self.deadline = self.submitted + seconds
        self.cancelled = False

    def cancel(self) -> None:
        """Cancels the request; the engine frees its slot in the next turn."""
        self.cancelled = True

    async def __aiter__(self) -> AsyncIterator[Event]:
        while (event := await self._events.get()) is not None:
            yield event

    async def result(self) -> Result:
        """Waits for the result.

        Raises:
          TimeUp, Failed, Stopping: there is none.
        """
        return await asyncio.shield(self._end)

    def emit(self, event: Event) -> None:
        """Called by the engine's thread."""
        self._call(self._events.put_nowait, event)

    def finish(self, result: Result) -> None:
        """Called by the engine's thread."""
        self._call(self._settle, lambda: self._end.set_result(result))

    def fail(self, error: Exception) -> None:
        """Called by the engine's thread."""
        self._call(self._settle, lambda: self._end.set_exception(error))

    def _settle(self, end: Callable[[], None]) -> None:
        if not self._end.done():
            end()
            self._events.put_nowait(None)

    def _call(self, function: Callable, *arguments: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:  # the loop is closed: nobody is waiting
            self.cancelled = True
