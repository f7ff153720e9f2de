"""Decodes uploads in processes of their own, so that no file can hold up the server or take its memory.

    await decode(uploads) ─▶ a thread of the pool ─ bytes ─▶ process (`decoding_worker.py`) ─▶ uint8 [N, S, S, 3]
                                     └─ its deadline, its memory, or a crash: the process is ended and replaced

The files of a request are decoded by one process, one after the other, within `Limits.decode_seconds` together. At most
`Limits.decoders` requests are decoded at a time and `Limits.waiting` wait, so a request without files never waits here.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from jaxtyping import UInt8

from emu_jax.serve import decoding_worker as worker
from emu_jax.serve.limits import MEGA, LimitError, Limits
from emu_jax.serve.ticket import Busy, Failed, Stopping, TimeUp

log = logging.getLogger(__name__)

NOT_STARTED = "the process that decodes images did not start; the server's log says why"
START_SECONDS = 60.0  # for a process to start on a busy machine
# What Python and its libraries need of the environment; keys and credentials are none of it.
ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "SYSTEMROOT", "TEMP", "TMP", "TMPDIR", "HOME")
# Each thread of these libraries, and each arena of malloc, reserves address space, which is what is bounded.
FEW_THREADS = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}


@dataclasses.dataclass(frozen=True)
class Upload:
    """An encoded image or video that a client sent, and the field or file name that errors name."""

    data: bytes
    where: str
    is_video: bool = False


class Decoders:
    """A pool of decoding processes; they start when they are first needed, or by `start`. `close` ends them."""

    def __init__(self, limits: Limits):
        self._limits = limits
        self._threads = ThreadPoolExecutor(limits.decoders, thread_name_prefix="decoder")
        self._lock = threading.Lock()
        self._idle: list[_Process] = []
        self._all: set[_Process] = set()
        self._waiting = 0  # requests, with those that are decoded now
        self._closed = False

    def start(self) -> None:
        """Starts all processes, and does not wait for them."""
        with self._lock:
            while not self._closed and len(self._all) < self._limits.decoders:
                self._idle.append(self._new())

    def close(self) -> None:
        """Ends all processes; requests that are being decoded fail with Stopping."""
        with self._lock:
            self._closed = True
            processes = list(self._all)
        for process in processes:
            process.end()
        self._threads.shutdown(wait=False)  # requests that wait for a thread find out that it is closed

    async def decode(self, uploads: Sequence[Upload], size: int) -> list[UInt8[np.ndarray, "N size size 3"]]:
        """Each upload's image, or the images of a video, of the model's size.

        Raises:
          LimitError: an upload that is no image, or needs too much time or memory; it names which.
          Busy, Stopping, TimeUp: try again later. Failed: no process can be started.
        """
        if not uploads:
            return []
        if self._closed:
            raise Stopping("the server is stopping; try again later")
        if self._waiting >= self._limits.waiting + self._limits.decoders:
            raise Busy(f"{self._waiting} requests with images are waiting already; try again in a few seconds")
        self._waiting += 1
        try:
            loop = asyncio.get_running_loop()
            late = time.monotonic() + self._limits.seconds
            return await loop.run_in_executor(self._threads, self._decode, uploads, size, late)
        finally:
            self._waiting -= 1

    def _decode(self, uploads: Sequence[Upload], size: int, late: float) -> list[np.ndarray]:
        """`decode` in a thread, unless it is later than `late` by now."""
        if time.monotonic() > late:
            raise TimeUp(f"the request took longer than {self._limits.seconds:g} seconds")
        process = self._take()
        try:
            process.wait_until_ready()
            end = time.monotonic() + self._limits.decode_seconds
            return [process.decode(upload, size, end) for upload in uploads]
        except _EndedError:
            raise Stopping("the server is stopping; try again later") from None
        finally:
            self._give_back(process)

    def _new(self) -> _Process:
        """The caller holds the lock."""
        process = _Process(self._limits)
        self._all.add(process)
        return process

    def _take(self) -> _Process:
        with self._lock:
            if self._closed:
                raise Stopping("the server is stopping; try again later")
            while self._idle:
                process = self._idle.pop()
                if process.is_alive:  # the system may have ended it for its memory
                    return process
                self._all.discard(process)
            return self._new()

    def _give_back(self, process: _Process) -> None:
        """Replaces a process that has ended, so that the next request need not wait for a start."""
        with self._lock:
            if process.usable:
                self._idle.append(process)
                return
            self._all.discard(process)
            if not self._closed:
                with contextlib.suppress(Failed):  # the next request tries again, and is told
                    self._idle.append(self._new())
        process.end()


class _EndedError(Exception):
    """The process has ended without a reply."""


class _Process:
    """One decoding process; `usable` until it is ended, by itself or by `end`."""

    def __init__(self, limits: Limits):
        self._limits = limits
        self._ready = False
        self._ended = threading.Event()  # by us
        self.usable = True
        environment = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ} | FEW_THREADS
        environment["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, sys.path))
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", worker.__name__, str(limits.decode_bytes)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment,
                start_new_session=True,  # Ctrl-C reaches the server alone, which then ends this
            )
        except OSError as error:
            log.error("the process that decodes images did not start (%s)", error)
            raise Failed(NOT_STARTED) from error

    @property
    def is_alive(self) -> bool:
        """Whether it runs."""
        return self._process.poll() is None

    def kill(self) -> None:
        """Kills the process, which must then be given back."""
        self.usable = False
        self._process.kill()

    def end(self) -> None:
        """Ends the process whatever it does."""
        self.usable = False
        self._ended.set()
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):  # what was written and not read
                pipe.close()

    def wait_until_ready(self) -> None:
        """Waits for its start; Failed if it cannot start."""
        if self._ready:
            return
        with _Deadline(self, START_SECONDS):
            try:
                self._ready = self._read(1) == worker.READY
            except _EndedError:
                if self._ended.is_set():
                    raise
        if not self._ready:
            self.usable = False
            log.error("the process that decodes images did not start (exit code %s)", self._process.wait())
            raise Failed(NOT_STARTED)

    def decode(self, upload: Upload, size: int, end: float) -> np.ndarray:
        """Pixels uint8 [N, size, size, 3], before the time `end`."""
        where, limits = upload.where, self._limits
        with _Deadline(self, end - time.monotonic()) as deadline:
            try:
                self._write(worker.REQUEST.pack(upload.is_video, size, len(upload.data)), upload.data)
                word, count = worker.REPLY.unpack(self._read(worker.REPLY.size))
                most = worker.VIDEO_IMAGES * size * size * 3 if word == worker.PIXELS else worker.MAX_DETAIL_BYTES
                if count > most:
                    raise _EndedError
                content = self._read(count)
            except _EndedError:
                word, content = worker.FAILED, b""
        if deadline.passed:
            raise LimitError(
                where,
                f"{where}: the request's images take longer than {limits.decode_seconds:g} s to decode; scale them "
                "down, or save them as JPEG or PNG",
            )
        if word == worker.PIXELS and count and count % (size * size * 3) == 0:
            return np.frombuffer(content, np.uint8).reshape(-1, size, size, 3)
        if word == worker.UNREADABLE:
            raise LimitError(where, f"{where}: {content.decode(errors='replace')}")
        if self._ended.is_set():
            raise _EndedError
        self.usable = False
        if word == worker.TOO_LARGE:
            raise LimitError(
                where, f"{where}: decoding it needs more than {limits.decode_bytes // MEGA} MB of memory; scale it down"
            )
        log.warning("a decoder ended at an upload (%s)", content.decode(errors="replace") or "without a reply")
        raise LimitError(where, f"{where}: its decoder failed; save it anew, as JPEG or PNG")

    def _write(self, *pieces: bytes) -> None:
        assert self._process.stdin is not None
        try:
            for piece in pieces:
                self._process.stdin.write(piece)
            self._process.stdin.flush()
        except (OSError, ValueError) as error:  # ValueError: `end` has closed it
            raise _EndedError from error

    def _read(self, count: int) -> bytes:
        assert self._process.stdout is not None
        try:
            content = self._process.stdout.read(count)
        except (OSError, ValueError) as error:
            raise _EndedError from error
        if len(content) < count:
            raise _EndedError
        return content


class _Deadline:
    """Kills a process unless the block ends within some seconds; `passed` says whether it did not."""

    def __init__(self, process: _Process, seconds: float):
        self.passed = False
        self._process = process
        self._timer = threading.Timer(max(seconds, 0), self._kill)

    def __enter__(self) -> _Deadline:
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        self._timer.join()  # it may be about to kill: a process that is given back must stay alive

    def _kill(self) -> None:
        self.passed = True
        self._process.kill()
