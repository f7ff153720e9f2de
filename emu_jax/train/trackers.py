"""Trackers: where a run's numbers go beside metrics.jsonl and TensorBoard.

`wandb` (Weights & Biases) and `trackio` (on this machine, or a space) are extras; an installed package adds its own in
the group `emu_jax.trackers`: a function of a `TrackedRun`, which returns a `Tracker`.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import json
import os
import pathlib
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any, Protocol

from ml_collections import ConfigDict
from tqdm import tqdm

from emu_jax.config import to_json
from emu_jax.errors import UserError, nearest
from emu_jax.observation import Observation
from emu_jax.storage import Path, is_bucket
from emu_jax.train.sections import tag

PROJECT = "emu_jax"  # unless WANDB_PROJECT or TRACKIO_PROJECT names another
ENTRY_POINTS = "emu_jax.trackers"


@dataclasses.dataclass(frozen=True)
class TrackedRun:
    """What a tracker is told of a run.

    Attributes:
      name: for people; by default the name of the work directory.
      id: which no other run has; it stays when the run is started again.
      config: the whole config, a ConfigDict.
      facts: of this start (`starts.describe`).
    """

    name: str
    id: str
    workdir: Path
    config: ConfigDict
    facts: Mapping[str, Any]


class Tracker(Protocol):
    """Takes a run's rows. A run that resumes gives some rows again, with the same numbers."""

    def log(self, step: int, row: Mapping[str, float], seen: Observation) -> None:
        """Takes the metrics of a step, and what is seen at it; the numbers of `seen` are in the row."""

    def close(self) -> None:
        """Returns once everything is written."""


class WandB:
    """Weights & Biases; WANDB_MODE=offline writes files into the work directory, for `wandb sync`."""

    def __init__(self, run: TrackedRun):
        self._wandb = wandb = _imported("wandb")
        folder = tempfile.mkdtemp() if is_bucket(run.workdir) else str(run.workdir)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or PROJECT,
            name=run.name,
            id=run.id,
            resume="allow",
            config=_described(run),
            dir=folder,
            settings=wandb.Settings(console="off", silent=True),
        )

    def log(self, step: int, row: Mapping[str, float], seen: Observation) -> None:
        if step >= self._run.step:  # what a resumed run repeats is there already
            self._run.log(_all(self._wandb, row, seen), step=step)

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """Trackio: a database in TRACKIO_DIR, which `trackio show` shows as a page."""

    def __init__(self, run: TrackedRun):
        self._trackio, project = _imported("trackio"), os.environ.get("TRACKIO_PROJECT") or PROJECT
        name = f"{run.name}-{run.id[:6]}"  # its runs are told apart by name
        self._run = self._trackio.init(
            project=project,
            name=name,
            config=_described(run),
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        storage = importlib.import_module("trackio.sqlite_storage").SQLiteStorage
        self._last = storage.get_last_step(project, name) if name in storage.get_runs(project) else None

    def log(self, step: int, row: Mapping[str, float], seen: Observation) -> None:
        if self._last is None or step > self._last:  # what a resumed run repeats is there already
            self._trackio.log(_all(self._trackio, row, seen), step=step)

    def close(self) -> None:
        self._trackio.finish()


TRACKERS: dict[str, Callable[[TrackedRun], Tracker]] = {"wandb": WandB, "trackio": Trackio}


def find_tracker(name: str) -> Callable[[TrackedRun], Tracker]:
    """One of `TRACKERS`, or the tracker of an installed package.

    Raises:
      UserError: there is no such tracker, or its package is not installed.
    """
    added = importlib.metadata.entry_points(group=ENTRY_POINTS)
    if name in TRACKERS:
        _imported(name)
        return TRACKERS[name]
    if name not in added.names:
        raise UserError(f"track={name}: unknown; did you mean {nearest(name, [*TRACKERS, *added.names])}?")
    try:
        return added[name].load()
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"track={name}: {added[name].value} cannot be imported ({error}); expected a function of a TrackedRun"
        ) from error


class Trackers:
    """Several trackers of one run. One that fails is left out from then on, and one line says so: the run goes on."""

    def __init__(self, names: Sequence[str], run: TrackedRun):
        self._running: dict[str, Tracker] = {}
        for name in names:
            try:
                self._running[name] = find_tracker(name)(run)
            except UserError:
                raise
            except Exception as error:  # of a network, a login or a disk: whatever the package raises
                self._lost(name, error)

    def log(self, step: int, row: Mapping[str, float], seen: Observation) -> None:
        self._each(lambda tracker: tracker.log(step, row, seen))

    def close(self) -> None:
        self._each(lambda tracker: tracker.close())

    def _each(self, act: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._running.items()):
            try:
                act(tracker)
            except Exception as error:  # as above
                self._lost(name, error)

    def _lost(self, name: str, error: Exception) -> None:
        self._running.pop(name, None)
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        tqdm.write(  # on a line of its own, above the progress bar
            f"emu-jax train: track={name}: {reason}; it gets nothing more of this start, and metrics.jsonl has all "
            "numbers",
            file=sys.stderr,
        )


def _all(package: ModuleType, row: Mapping[str, float], seen: Observation) -> dict[str, Any]:
    """A row with images and histograms, in the types that both packages have, by section."""
    images = {name: package.Image(pixels) for name, pixels in seen.images.items()}
    histograms = {name: package.Histogram(values) for name, values in seen.histograms.items()}
    return {tag(name): value for name, value in {**row, **images, **histograms}.items()}


def _described(run: TrackedRun) -> dict[str, Any]:
    """The config and the facts of this start, as JSON has them."""
    return {**json.loads(to_json(run.config)), "start": json.loads(json.dumps(dict(run.facts)))}


def default_name(workdir: Path) -> str:
    """A run's name for people: the work directory's."""
    return pathlib.Path(str(workdir)).absolute().name or "run"


def _imported(package: str) -> ModuleType:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UserError(f"track={package}: not installed; pip install 'emu-jax[{package}]'") from error
