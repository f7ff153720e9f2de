"""Where a run's numbers go: metrics.jsonl, TensorBoard events, a progress bar, and curves as PNG at the end.

Beside them goodput.jsonl, which tells where the time went, and an xprof trace of some steps for who asks for it.
"""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import matplotlib
import numpy as np
from tensorboardX import SummaryWriter
from tqdm import tqdm

from emu_jax.data.pipeline import Stream
from emu_jax.errors import UserError
from emu_jax.workdir import METRICS_FILE, read_metrics

matplotlib.use("Agg")
from matplotlib import pyplot as plt

PLOTS = {
    "losses": ("text_loss", "regression_loss", "absolute_error", "squared_error", "kl", "noise_error"),
    "collapse": ("variance_fraction", "effective_rank"),
    "optimisation": ("grad_norm", "update_norm", "param_norm", "learning_rate", "ema_decay"),
    "speed": ("step_ms", "input_wait_ms", "images_per_s", "tokens_per_s", "model_gflop_per_s"),
    "packing": ("pad_fraction", "slot_occupancy"),
}

COUNTED = ("tokens", "images")  # of a batch: reported by the second


def is_of_source(name: str) -> bool:
    """Whether a metric is one source's share of a loss; other metrics with a "/" are of a part of the model.

    >>> is_of_source("text_loss/laion_2b"), is_of_source("grad_norm/vision")
    (True, False)
    """
    kind, _, source = name.partition("/")
    return bool(source) and kind in PLOTS["losses"]


class MetricsWriter:
    """Appends rows of numbers; after a resume it first forgets rows that the run will write again.

    A row has the metrics of its own step, but losses by source, which are means over all steps since the last row.
    """

    def __init__(self, workdir: Path, *, start: int, total: int):
        self._path = workdir / METRICS_FILE
        rows = read_metrics(self._path) if self._path.exists() else []
        _replace_rows(self._path, [row for row in rows if row["step"] <= start])
        self._file = self._path.open("a", encoding="utf-8")
        self._events = SummaryWriter(str(workdir / "tensorboard"), purge_step=start + 1)
        self._bar = tqdm(total=total, initial=start, desc="train", unit="step", dynamic_ncols=True)
        self._held: tuple[int, Mapping[str, jax.Array], Mapping[str, float]] | None = None
        self._sources: list[dict[str, jax.Array]] = []  # losses by source, of the steps since the last row

    def note(self, metrics: Mapping[str, jax.Array]) -> None:
        """A step's losses by source: a rare one has none in most batches, so rows tell their means over all steps."""
        self._sources.append({name: value for name, value in metrics.items() if is_of_source(name)})

    def hold(self, step: int, metrics: Mapping[str, jax.Array], row: Mapping[str, float]) -> None:
        """One row, of which `metrics` are still being computed; `flush` waits for them."""
        self.flush()
        self._held = step, metrics, row

    def flush(self) -> None:
        """Writes the row that is held, if any; it is on disk when this returns."""
        if self._held is not None:
            step, metrics, row = self._held
            self._held = None
            computed = jax.device_get(metrics).items()
            values = {name: float(value) for name, value in computed if not is_of_source(name)}
            noted = jax.device_get(self._sources)
            self._sources = []
            for name in noted[0] if noted else ():
                found = [float(values[name]) for values in noted if not np.isnan(values[name])]
                values |= {name: sum(found) / len(found)} if found else {}
            self._write(step, values | dict(row))

    def _write(self, step: int, row: Mapping[str, float]) -> None:
        self._file.write(json.dumps({"step": step, **row}) + "\n")
        self._file.flush()
        for name, value in row.items():
            self._events.add_scalar(name, value, step)
        self._bar.set_postfix({name: f"{row[name]:.3f}" for name in PLOTS["losses"] if name in row}, refresh=False)

    def advance(self) -> None:
        self._bar.update()

    def close(self) -> None:
        self.flush()
        self._bar.close()
        self._events.close()
        self._file.close()


class NoWriter:
    """Stands for `MetricsWriter` on all processes but the first: one of them writes what all of them compute."""

    def note(self, metrics: Mapping[str, jax.Array]) -> None: ...

    def hold(self, step: int, metrics: Mapping[str, jax.Array], row: Mapping[str, float]) -> None: ...

    def flush(self) -> None: ...

    def advance(self) -> None: ...

    def close(self) -> None: ...


def next_batch_of(batches: Stream) -> dict[str, np.ndarray]:
    """The next batch.

    Raises:
      UserError: the data have ended, as those of sources with a number of epochs do.
    """
    try:
        return next(batches)
    except StopIteration:
        raise UserError(
            "config.data: every source has had its epochs, and the run has not had its steps; lower "
            "config.train.steps, or set epochs=0 for sources to be read for ever"
        ) from None


class Interval:
    """Times and batch statistics between two logged steps.

    Args:
      flops: of one step, analytically.
    """

    def __init__(self, flops: float):
        self._flops = flops
        self._restart()

    def _restart(self) -> None:
        self._start, self._wait = time.monotonic(), 0.0
        self._batches: list[dict[str, float]] = []

    def next_batch(self, batches: Stream) -> dict[str, np.ndarray]:
        """The next batch, timing how long it is waited for.

        Raises:
          UserError: the data have ended.
        """
        started = time.monotonic()
        batch = next_batch_of(batches)
        self._wait += time.monotonic() - started
        self._batches.append(batches.describe())
        return batch

    def finish(self) -> dict[str, float]:
        """Means over the interval, which then starts anew."""
        seconds, count = time.monotonic() - self._start, len(self._batches)
        mean = {name: float(np.mean([b[name] for b in self._batches])) for name in self._batches[0]}
        counted = {name: mean.pop(name) for name in COUNTED if name in mean}
        row = mean | {
            **{f"{name}_per_s": value * count / seconds for name, value in counted.items()},
            "step_ms": 1e3 * seconds / count,
            "input_wait_ms": 1e3 * self._wait / count,
            "compute_ms": 1e3 * (seconds - self._wait) / count,
            "model_gflop_per_s": self._flops * count / seconds / 1e9,
        }
        self._restart()
        return row


class Goodput:
    """What a run's time was spent on, over all its starts: a row at every start and checkpoint.

    A row: `step`, `time` (seconds since 1970), and in seconds, counted from the first start: `startup_s`, `compile_s`,
    `input_wait_s`, `checkpoint_s` (what the loop waited for them), `restart_s` (from the last row of a run that was
    ended to its next start: steps that were lost, and the pause), `training_s` (all else). They add up to the time
    since the first start; `goodput` is the share of `training_s`.

    Args:
      path: of the file; None writes none. began: when this start was.
    """

    LOSSES = ("startup_s", "compile_s", "input_wait_s", "checkpoint_s", "restart_s")

    def __init__(self, path: Path | None, began: float):
        self._path, self._began, self._first = path, began, began
        self._lost = dict.fromkeys(self.LOSSES, 0.0)

    @contextlib.contextmanager
    def losing(self, what: str) -> Iterator[None]:
        """Counts the time inside as lost."""
        started = time.time()
        yield
        self._lost[what] += time.time() - started

    def start(self, step: int) -> None:
        """Training begins behind `step`; rows of later steps, which it repeats, are forgotten."""
        self._lost["startup_s"] = time.time() - self._began - sum(self._lost.values())
        if self._path is None:
            return
        rows = [row for row in read_metrics(self._path) if row["step"] <= step] if self._path.exists() else []
        _replace_rows(self._path, rows)
        if rows:
            last = rows[-1]
            before = {name: last[name] for name in self.LOSSES}
            self._first = last["time"] - sum(before.values()) - last["training_s"]
            before["restart_s"] += self._began - last["time"]
            self._lost = {name: value + before[name] for name, value in self._lost.items()}
        self.write(step)

    def write(self, step: int) -> None:
        if self._path is None:
            return
        now = time.time()
        training = now - self._first - sum(self._lost.values())
        row = {
            "step": step,
            "time": now,
            **self._lost,
            "training_s": training,
            "goodput": training / (now - self._first),
        }
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def parse_steps(text: str) -> range:
    """`--profile-steps`: FIRST:LAST.

    >>> parse_steps("10:15")
    range(10, 16)
    """
    match = re.fullmatch(r"(\d{1,9}):(\d{1,9})", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise UserError(f"--profile-steps {text}: expected FIRST:LAST, steps counted from 1, as in 10:15")
    return range(int(match[1]), int(match[2]) + 1)


class Trace:
    """An xprof trace of some steps, in `folder`; none where a run begins behind their first."""

    def __init__(self, folder: Path, steps: range):
        self._folder, self._steps, self._running = folder, steps, False

    def begin(self, step: int) -> None:
        if self._steps and step == self._steps.start:
            jax.profiler.start_trace(str(self._folder))
            self._running = True

    def end(self, step: int, results: Any) -> None:
        if self._running and step == self._steps[-1]:
            jax.block_until_ready(results)
            self.close()

    def close(self) -> None:
        """Writes what a run that stops earlier has traced."""
        if self._running:
            jax.profiler.stop_trace()
            self._running = False


def _replace_rows(path: Path, rows: Sequence[Mapping[str, float]]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    partial.replace(path)


def lines_of(name: str, known: Collection[str]) -> list[str]:
    """The metrics that one plot shows: the one of this name, and those of sources or parts.

    >>> lines_of("grad_norm", {"grad_norm/vision", "grad_norm/causal", "grad_norm", "loss"})
    ['grad_norm', 'grad_norm/causal', 'grad_norm/vision']
    """
    return sorted(found for found in known if found == name or found.startswith(f"{name}/"))


def plot_metrics(workdir: Path) -> list[Path]:
    """Draws metrics.jsonl as `workdir/plots/<group>.png`; sources and parts of the model are lines of one plot."""
    rows = read_metrics(workdir / METRICS_FILE)
    folder = workdir / "plots"
    folder.mkdir(exist_ok=True)
    paths = []
    known = {name for row in rows for name in row}
    for group, wanted in PLOTS.items():
        lines = {name: lines_of(name, known) for name in wanted}
        names = [name for name in wanted if lines[name]]
        if not names:
            continue
        figure, axes = plt.subplots(
            1, len(names), figsize=(4.2 * len(names), 3), constrained_layout=True, squeeze=False
        )
        for axis, name in zip(axes[0], names, strict=True):
            for line in lines[name]:
                points = np.array([(row["step"], row[line]) for row in rows if line in row]).reshape(-1, 2)
                axis.plot(points[:, 0], points[:, 1], linewidth=1, label=line.partition("/")[2] or "all")
            if lines[name] != [name]:
                axis.legend(fontsize=7)
            axis.set_title(name)
            axis.set_xlabel("step")
            axis.grid(alpha=0.25)
        paths.append(folder / f"{group}.png")
        figure.savefig(paths[-1], dpi=110)
        plt.close(figure)
    return paths
