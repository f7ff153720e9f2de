"""Runs Python code when C code calls `abort()`, as JAX does, in a thread of its own, when process 0 of a job is lost.

A handler of the module `signal` would only run in the main thread, and only once `abort` has returned: never.
"""

from __future__ import annotations

import ctypes
import signal
from collections.abc import Callable

_Handler = ctypes.CFUNCTYPE(None, ctypes.c_int)
_libc = ctypes.CDLL(None)
_libc.signal.argtypes, _libc.signal.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
_handler: ctypes._FuncPointer | None = None  # C code points to it


def handle(leave: Callable[[], None]) -> None:
    """Calls `leave` when this process aborts. If it returns, the process dies of SIGABRT, as without it."""
    global _handler
    _handler = _Handler(lambda number: leave())
    _libc.signal(signal.SIGABRT, ctypes.cast(_handler, ctypes.c_void_p))


def reset() -> None:
    """Lets an abort end the process as usual."""
    global _handler
    _libc.signal(signal.SIGABRT, None)  # SIG_DFL
    _handler = None
