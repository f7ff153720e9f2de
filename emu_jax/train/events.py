"""A run's numbers as TensorBoard shows them, written here and now.

`tensorboardX.SummaryWriter` has a queue and a thread; a full disk ends the thread, and the run waits for the queue for
ever.
"""

from __future__ import annotations

import contextlib
import math
import struct
import sys
import time
from collections.abc import Iterator, Mapping

from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import masked_crc32c
from tensorboardX.summary import histogram, hparams, image, scalar, text

from emu_jax.errors import TransientError
from emu_jax.growing_file import GrowingFile
from emu_jax.observation import NOTHING, Observation
from emu_jax.storage import Path
from emu_jax.train.sections import tag

VERSION = "brain.Event:2"
METRICS = ("loss", "text_loss", "regression_loss")  # beside hyperparameters, where a run has them


class Events:
    """Appends rows to a new file in `folder`; TensorBoard leaves out what older files have of the steps after `start`.

    They are a copy of metrics.jsonl. Where they cannot be written, one line says so, and the run continues without.
    """

    def __init__(self, folder: Path, start: int):
        self._path = folder / f"events.out.tfevents.{time.time_ns()}"
        self._file: GrowingFile | None = None
        again = SessionLog(status=SessionLog.START)
        first = Event(wall_time=time.time(), file_version=VERSION)
        purge = Event(wall_time=time.time(), step=start + 1, session_log=again)
        with self._or_without():
            folder.mkdir(exist_ok=True)
            self._file = GrowingFile(self._path, _record(first) + _record(purge))

    def describe(self, texts: Mapping[str, str], parameters: Mapping[str, float | str]) -> None:
        """Texts in Markdown, by tag; and hyperparameters, by name, beside which TensorBoard shows `METRICS`."""
        self._write(0, *(text(name, words) for name, words in texts.items()))
        self._write(0, *hparams(dict(parameters), dict.fromkeys(map(tag, METRICS), 0.0)))

    def add(self, step: int, row: Mapping[str, float], seen: Observation = NOTHING) -> None:
        finite = {name: number for name, number in row.items() if math.isfinite(number)}  # a bad step's are not all
        self._write(
            step,
            *(scalar(tag(name), number) for name, number in finite.items()),
            *(image(tag(name), pixels, dataformats="HWC") for name, pixels in seen.images.items()),
            *(histogram(tag(name), values, bins="auto") for name, values in seen.histograms.items()),
        )

    def _write(self, step: int, *summaries: Summary) -> None:
        values = [value for summary in summaries for value in summary.value]
        if self._file is not None:
            with self._or_without():
                self._file.add(_record(Event(wall_time=time.time(), step=step, summary=Summary(value=values))))

    def close(self) -> None:
        if self._file is not None:
            with self._or_without():
                self._file.close()

    @contextlib.contextmanager
    def _or_without(self) -> Iterator[None]:
        try:
            yield
        except (OSError, TransientError) as error:
            print(
                f"emu-jax train: {self._path}: {error}; nothing more is written for TensorBoard, and metrics.jsonl has "
                "the same numbers",
                file=sys.stderr,
            )
            self._file = None


def _record(event: Event) -> bytes:
    """An event as its file has it: length, event, and their checksums."""
    data = event.SerializeToString()
    length = struct.pack("<Q", len(data))
    return b"".join(part + struct.pack("<I", masked_crc32c(part)) for part in (length, data))
