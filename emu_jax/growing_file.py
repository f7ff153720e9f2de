"""A file that grows, on a local disk or in a bucket, which has no append."""

from __future__ import annotations

import errno
import os
import pathlib
import time
from concurrent.futures import Future, ThreadPoolExecutor

from emu_jax.storage import Path, replace_bytes

UPLOAD_EVERY = 30.0  # seconds between uploads to a bucket, beside those of `flush`


class GrowingFile:
    """Replaces the file at `path` with `data` and appends to it.

    On a local disk the data are in the file when `add` returns, all of them or none. In a bucket the whole file is
    uploaded from time to time by a thread of its own, so that `add` never waits, and by `flush` and `close`.

    Raises:
      OSError, TransientError: the file cannot be written; after an upload of the thread's own, at the next call.
    """

    def __init__(self, path: Path, data: bytes = b""):
        self._path = path
        replace_bytes(path, data)
        if isinstance(path, pathlib.Path):
            return
        self._data, self._uploaded = bytearray(data), len(data)
        self._uploads = ThreadPoolExecutor(1, "emu-jax-uploads")
        self._upload: Future[None] | None = None
        self._when = time.monotonic()

    def add(self, data: bytes) -> None:
        """Appends."""
        if isinstance(self._path, pathlib.Path):
            _append(self._path, data)
            return
        self._data += data
        if time.monotonic() - self._when > UPLOAD_EVERY and (self._upload is None or self._upload.done()):
            self._start()

    def _start(self) -> None:
        """Starts an upload of everything; raises the error of the last one."""
        if self._upload is not None:
            self._upload.result()
        self._upload = self._uploads.submit(replace_bytes, self._path, bytes(self._data))
        self._uploaded, self._when = len(self._data), time.monotonic()

    def flush(self) -> None:
        """Returns once everything is in the file."""
        if isinstance(self._path, pathlib.Path):
            return
        if self._uploaded < len(self._data):
            self._start()
        if self._upload is not None:
            self._upload.result()

    def close(self) -> None:
        if isinstance(self._path, pathlib.Path):
            return
        try:
            self.flush()
        finally:
            self._uploads.shutdown()


def _append(path: pathlib.Path, data: bytes) -> None:
    """Appends all or nothing.

    Raises:
      OSError: names the file; a full disk, for example.
    """
    with path.open("ab", buffering=0) as file:
        size = file.tell()
        try:
            if file.write(data) < len(data):  # of a disk that is full now, some may still be written
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            file.truncate(size)
            error.filename = str(path)
            raise
