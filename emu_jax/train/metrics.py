"""Where a run's numbers go: metrics.jsonl, TensorBoard events, a progress bar, and curves as PNG at the end.

Also goodput.jsonl, which accounts for the run's time, and on request an xprof trace of some steps.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import matplotlib
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from emu_jax.config import to_json
from emu_jax.errors import UserError
from emu_jax.growing_file import GrowingFile
from emu_jax.observation import NOTHING, Observation
from emu_jax.storage import Path, replace_text, write_atomically
from emu_jax.train.changes import fields_of
from emu_jax.train.events import Events
from emu_jax.train.trackers import TrackedRun, Trackers
from emu_jax.workdir import METRICS_FILE, read_metrics

matplotlib.use("Agg")
from matplotlib import pyplot as plt

# Figures of every run, beside those of its task (`Task.plots`).
PLOTS = {
    "optimisation": ("grad_norm", "update_norm", "param_norm", "learning_rate", "ema_decay"),
    "speed": ("step_ms", "input_wait_ms", "images_per_s", "tokens_per_s", "model_gflop_per_s"),
}


log = logging.getLogger(__name__)


class MetricsWriter:
    """Appends rows of numbers; after a resume it first removes the rows that the run will write again.

    A row has the metrics of its own step, except losses by source, which are means over all steps since the last row.

    Args:
      losses: names of the losses; "name/source" is one source's. Other metrics with a "/" are of a part of the model.
      track: names of trackers, which get the rows, too.
    """

    def __init__(self, run: TrackedRun, *, start: int, total: int, losses: Sequence[str], track: Sequence[str] = ()):
        workdir = run.workdir
        self._losses = tuple(losses)
        self._path = workdir / METRICS_FILE
        rows = read_metrics(self._path) if self._path.exists() else []
        self._rows = GrowingFile(self._path, b"".join(_line(row) for row in rows if row["step"] <= start))
        self._events, self._trackers = Events(workdir / "tensorboard", start), Trackers(track, run)
        texts = {"config": to_json(run.config), "start": json.dumps(dict(run.facts), indent=2)}
        self._events.describe(
            {tag: f"```json\n{text}\n```" for tag, text in texts.items()}, hyperparameters(run.config)
        )
        self._bar = tqdm(total=total, initial=start, desc="train", unit="step", dynamic_ncols=True)
        self._held: tuple[int, Mapping[str, jax.Array], Mapping[str, float], Observation] | None = None
        self._by_source: list[dict[str, jax.Array]] = []  # losses by source of the steps since the last row

    def _is_by_source(self, name: str) -> bool:
        loss, _, source = name.partition("/")
        return bool(source) and loss in self._losses

    def add(
        self,
        step: int,
        metrics: Mapping[str, jax.Array],
        row: Mapping[str, float] | None,
        seen: Observation = NOTHING,
    ) -> None:
        """Takes a step's metrics, what else its row has, and what is seen at it; None: the step has no row."""
        self.flush()
        self.note(metrics)
        self._bar.update()
        if row is not None:
            self.hold(step, metrics, row, seen)

    def note(self, metrics: Mapping[str, jax.Array]) -> None:
        """Takes a step's losses by source. Most batches have none of a rare source, so a row averages over steps."""
        self._by_source.append({name: value for name, value in metrics.items() if self._is_by_source(name)})

    def hold(
        self, step: int, metrics: Mapping[str, jax.Array], row: Mapping[str, float], seen: Observation = NOTHING
    ) -> None:
        """Takes a row whose `metrics` are still being computed; `flush` waits for them."""
        self.flush()
        self._held = step, metrics, row, seen

    def flush(self) -> None:
        """Writes the row that was taken last, unless it is written."""
        if self._held is not None:
            step, metrics, row, seen = self._held
            self._held = None
            computed = jax.device_get(metrics).items()
            values = {name: float(value) for name, value in computed if not self._is_by_source(name)}
            noted = jax.device_get(self._by_source)
            self._by_source = []
            for name in noted[0] if noted else ():
                found = [float(values[name]) for values in noted if not np.isnan(values[name])]
                values |= {name: sum(found) / len(found)} if found else {}
            self._write(step, values | dict(row), seen)

    def _write(self, step: int, row: Mapping[str, float], seen: Observation) -> None:
        self._rows.add(_line({"step": step, **row}))
        self._events.add(step, row, seen)
        self._trackers.log(step, row, seen)
        self._bar.set_postfix({name: f"{row[name]:.3f}" for name in self._losses if name in row}, refresh=False)

    def commit(self) -> None:
        """Returns once all rows are on disk, or in their bucket."""
        self.flush()
        self._rows.flush()

    def close_bar(self) -> None:
        self._bar.close()

    def close(self) -> None:
        self.flush()
        self.close_bar()
        self._events.close()
        self._rows.close()
        self._trackers.close()


def hyperparameters(config: ConfigDict) -> dict[str, float | str]:
    """The fields of a config by their names with dots: numbers as they are, the rest as text."""
    fields = fields_of(json.loads(to_json(config)))
    return {name: value if isinstance(value, int | float) else json.dumps(value) for name, value in fields.items()}


def _line(row: Mapping[str, float]) -> bytes:
    return (json.dumps(row) + "\n").encode()


class Goodput:
    """Accounts for a run's time over all its starts: a row at every start and checkpoint.

    A row has `step`, `time` (seconds since 1970), and in seconds, counted from the first start: `startup_s`,
    `compile_s`, `input_wait_s`, `checkpoint_s` (how long the loop waited for checkpoints), `scoring_s` (`train`'s
    `scoring`), `restart_s` (from the last
    row before an interruption to the next start: lost steps, and the pause) and `training_s` (the remaining time). They
    add up to the time since the first start; `goodput` is the share of `training_s`.

    Args:
      path: the file; None writes none.
      began: time of this start, in seconds since 1970.
    """

    LOSSES = ("startup_s", "compile_s", "input_wait_s", "checkpoint_s", "scoring_s", "restart_s")

    def __init__(self, path: Path | None, began: float):
        self._path, self._began, self._first = path, began, began
        self._lost = dict.fromkeys(self.LOSSES, 0.0)
        self._rows: list[dict[str, float]] = []

    @contextlib.contextmanager
    def losing(self, what: str) -> Iterator[None]:
        """Counts the time inside as lost."""
        started = time.time()
        yield
        self._lost[what] += time.time() - started

    def start(self, step: int) -> None:
        """Training starts after `step`; rows of later steps, which it repeats, are removed."""
        self._lost["startup_s"] = time.time() - self._began - sum(self._lost.values())
        if self._path is None:
            return
        rows = read_metrics(self._path) if self._path.exists() else []
        self._rows = [row for row in rows if row["step"] <= step]
        if self._rows:
            last = self._rows[-1]
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
        self._rows.append(row)
        replace_text(self._path, "".join(json.dumps(row) + "\n" for row in self._rows))


def parse_steps(text: str) -> range:
    """Steps as FIRST:LAST.

    >>> parse_steps("10:15")
    range(10, 16)
    """
    match = re.fullmatch(r"(\d{1,9}):(\d{1,9})", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise UserError(f"profile_steps={text}: expected FIRST:LAST, steps counted from 1, as in 10:15")
    return range(int(match[1]), int(match[2]) + 1)


PROFILE, PROFILE_REQUEST = "profile", "profile.request"  # in a work directory
REQUESTED_STEPS, MOST_REQUESTED_STEPS = 3, 100


class Trace:
    """An xprof trace of some steps, in workdir/profile; none where a run starts after the first of them.

    While a run trains, the file workdir/profile.request asks for a trace of the next steps, as many as it says, or 3.
    """

    def __init__(self, workdir: Path, steps: range):
        self._folder, self._request = workdir / PROFILE, workdir / PROFILE_REQUEST
        self._steps, self._running = steps, False

    def look_for_request(self, step: int) -> None:
        """Traces the steps after `step` if someone asks, and removes the request; a planned trace comes first."""
        if (self._steps and step < self._steps[-1]) or not self._request.exists():
            return
        text = self._request.read_text().strip()
        self._request.unlink()
        count = min(int(text), MOST_REQUESTED_STEPS) if re.fullmatch(r"[1-9]\d{0,8}", text) else REQUESTED_STEPS
        self._steps = range(step + 1, step + 1 + count)
        log.info("%s: tracing steps %d to %d", self._request, self._steps[0], self._steps[-1])

    def begin(self, step: int) -> None:
        if self._steps and step == self._steps.start:
            jax.profiler.start_trace(str(self._folder))
            self._running = True

    def end(self, step: int, results: Any) -> None:
        if self._running and step == self._steps[-1]:
            jax.block_until_ready(results)
            self.close()

    def close(self) -> None:
        """Writes the trace of a run that stops before the last of the steps."""
        if self._running:
            jax.profiler.stop_trace()
            self._running = False


def lines_of(name: str, known: Collection[str]) -> list[str]:
    """The metrics that one plot shows: the one of this name, and its sources' or parts'.

    >>> lines_of("grad_norm", {"grad_norm/vision", "grad_norm/causal", "grad_norm", "loss"})
    ['grad_norm', 'grad_norm/causal', 'grad_norm/vision']
    """
    return sorted(found for found in known if found == name or found.startswith(f"{name}/"))


def plot_metrics(workdir: Path, plots: Mapping[str, Sequence[str]]) -> list[Path]:
    """Plots metrics.jsonl as `workdir/plots/<figure>.png`; sources and parts of the model are lines of one plot.

    Args:
      plots: metrics by figure, beside `PLOTS`.
    """
    rows = read_metrics(workdir / METRICS_FILE)
    folder = workdir / "plots"
    folder.mkdir(exist_ok=True)
    paths: list[Path] = []
    known = {name for row in rows for name in row}
    for title, wanted in (PLOTS | dict(plots)).items():
        lines = {name: lines_of(name, known) for name in wanted}
        names = [name for name in wanted if lines[name]]
        if not names:
            continue
        figure, axes = plt.subplots(1, len(names), figsize=(4.2 * len(names), 3), squeeze=False)
        # A layout engine would draw every figure twice. In inches: room for the numbers beside and below each plot.
        width, height = figure.get_size_inches()
        figure.subplots_adjust(0.7 / width, 0.5 / height, 1 - 0.15 / width, 1 - 0.3 / height, wspace=0.25)
        for axis, name in zip(axes[0], names, strict=True):
            for line in lines[name]:
                points = np.array([(row["step"], row[line]) for row in rows if line in row]).reshape(-1, 2)
                axis.plot(points[:, 0], points[:, 1], linewidth=1, label=line.partition("/")[2] or "all")
            if lines[name] != [name]:
                axis.legend(fontsize=7)
            axis.set_title(name)
            axis.set_xlabel("step")
            axis.grid(alpha=0.25)
        paths.append(folder / f"{title}.png")
        with write_atomically(paths[-1]) as partial:
            figure.savefig(partial, dpi=110, format="png")
        plt.close(figure)
    return paths
