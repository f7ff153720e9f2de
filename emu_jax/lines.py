"""A text file that grows by lines, on a local disk or in a bucket, which has no append."""

from __future__ import annotations

import pathlib
import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import IO

from emu_jax.storage import Path, replace_text

UPLOAD_EVERY = 30.0  # seconds between uploads to a bucket, beside those of `flush`


class Lines:
    """Replaces the file at `path` with `lines` and appends further ones.

    On a local disk a line is in the file when `add` returns. In a bucket the whole file is uploaded from time to time
    by a thread of its own, so that `add` never waits, and by `flush` and `close`.

    Args:
      lines: the lines to begin with, without their line ends.

    Raises:
      OSError, TransientError: the file cannot be written; after an upload of the thread's own, at the next call.
    """

    def __init__(self, path: Path, lines: Iterable[str] = ()):
        self._path = path
        self._file: IO[str] | None = None
        self._lines = [line + "\n" for line in lines]
        replace_text(path, "".join(self._lines))
        if isinstance(path, pathlib.Path):
            self._lines = []
            self._file = path.open("a", encoding="utf-8")
            return
        self._uploads = ThreadPoolExecutor(1, "emu-jax-lines")
        self._upload: Future[None] | None = None
        self._uploaded, self._when = len(self._lines), time.monotonic()

    def add(self, line: str) -> None:
        """Appends a line, given without its line end."""
        if self._file is not None:
            self._file.write(line + "\n")
            self._file.flush()
            return
        self._lines.append(line + "\n")
        if time.monotonic() - self._when > UPLOAD_EVERY and (self._upload is None or self._upload.done()):
            self._start()

    def _start(self) -> None:
        """Starts an upload of all lines; raises the error of the last one."""
        if self._upload is not None:
            self._upload.result()
        self._upload = self._uploads.submit(replace_text, self._path, "".join(self._lines))
        self._uploaded, self._when = len(self._lines), time.monotonic()

    def flush(self) -> None:
        """Returns once all lines are in the file."""
        if self._file is not None:
            return
        if self._uploaded < len(self._lines):
            self._start()
        if self._upload is not None:
            self._upload.result()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            return
        try:
            self.flush()
        finally:
            self._uploads.shutdown()
