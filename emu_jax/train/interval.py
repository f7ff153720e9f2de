"""Times and counts between two logged steps, over all processes, and the share of the devices' peak that they used."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping

import jax
import numpy as np

from emu_jax.chips import peak_flops
from emu_jax.data.counts import Counts, add_batches, figures
from emu_jax.data.pipeline import Stream
from emu_jax.errors import UserError
from emu_jax.train.distributed import gather

PER_SECOND = ("tokens", "images")  # counts of a batch that are reported per second
BY_IMAGE = ("vision", "causal")  # parts whose FLOPs are those of image slots; those of the others are of positions


def next_batch_of(batches: Stream) -> dict[str, np.ndarray]:
    """The next batch.

    Raises:
      UserError: the data have ended, as they do where every source has a number of epochs.
    """
    try:
        return next(batches)
    except StopIteration:
        raise UserError(
            "config.data: every source has had its epochs, and the run has not had its steps; lower "
            "config.train.steps, or set epochs=0, which reads a source for ever"
        ) from None


class Interval:
    """Times and batch statistics between two logged steps.

    Args:
      flops: FLOPs of a step over all devices, by part, analytically (`Task.flops`): all slots and positions of its
        rows, used or not; empty where they are not counted.
    """

    def __init__(self, flops: Mapping[str, float]):
        self._flops = dict(flops)
        self._peak = peak_flops(jax.devices()[0].device_kind) * jax.device_count()
        self._restart()

    def _restart(self) -> None:
        self._start, self._wait = time.monotonic(), 0.0
        self._batches: list[Counts] = []

    def next_batch(self, batches: Stream) -> dict[str, np.ndarray]:
        """The next batch; times how long the loop waits for it.

        Raises:
          UserError: the data have ended.
        """
        started = time.monotonic()
        batch = next_batch_of(batches)
        self._wait += time.monotonic() - started
        self._batches.append(batches.counts())
        return batch

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves the time inside out of the interval."""
        started = time.monotonic()
        yield
        self._start += time.monotonic() - started

    def finish(self) -> dict[str, float]:
        """Figures of the interval, the same on every process; a new one starts. Every process calls it.

        Counts are of a step, over all processes, and shares are made of them (`data/counts.py`); times are those of the
        process that took longest:

            step_ms, input_wait_ms, compute_ms   milliseconds a step; the last is the rest of a step that waits longest
            slowest_process                      of several processes, the one that waits longest for data
            tokens_per_s, images_per_s           of all processes
            model_gflop_per_s, mfu               by all slots and positions; the share of the devices' bfloat16 peak
            useful_gflop_per_s, useful_mfu       by those that hold an image or a token
            memory_gb, memory_share              of the fullest device: bytes at the peak, and their share
        """
        own = {
            "seconds": time.monotonic() - self._start,
            "wait": self._wait,
            "counts": add_batches(self._batches),
            "memory": _memory(),
        }
        row = self._row(gather(own), len(self._batches))
        self._restart()
        return row

    def _row(self, processes: list[dict], steps: int) -> dict[str, float]:
        seconds = max(each["seconds"] for each in processes)
        waits = [each["wait"] for each in processes]
        row = figures([each["counts"] for each in processes], steps)
        used, filled = row.get("slot_occupancy", 1.0), 1.0 - row.get("pad_fraction", 0.0)
        counted = {name: row.pop(name) for name in PER_SECOND if name in row}
        row |= {f"{name}_per_s": value * steps / seconds for name, value in counted.items()}
        row |= {
            "step_ms": 1e3 * seconds / steps,
            "input_wait_ms": 1e3 * max(waits) / steps,
            "compute_ms": 1e3 * max(seconds - max(waits), 0.0) / steps,
        }
        if len(processes) > 1:
            row["slowest_process"] = float(np.argmax(waits))
        useful = {part: flops * (used if part in BY_IMAGE else filled) for part, flops in self._flops.items()}
        for kind, share, flops in (("model", "mfu", self._flops), ("useful", "useful_mfu", useful)):
            if flops:
                rate = sum(flops.values()) * steps / seconds
                row[f"{kind}_gflop_per_s"] = rate / 1e9
                row |= {share: rate / self._peak} if self._peak else {}
        peak, limit = max((each["memory"] for each in processes), key=lambda memory: memory[0])
        return row | ({"memory_gb": peak / 1e9, "memory_share": peak / limit} if peak and limit else {})


def _memory() -> tuple[float, float]:
    """Bytes of this process's fullest device at its peak, and its bytes in all; zeros where they are not told (CPU)."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    found = [(float(each.get("peak_bytes_in_use", 0)), float(each.get("bytes_limit", 0))) for each in stats]
    return max(found)
