"""The step with the lowest held-out loss (`config.eval.best`): its checkpoint is kept, and patience with a run ends.

workdir/best.json   {"loss": …, "step": …, "value": …}, once that step's checkpoint is on disk
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping

import jax

from emu_jax.storage import Path, replace_text
from emu_jax.train import distributed
from emu_jax.train.held_out_losses import PREFIX, EvalConfig
from emu_jax.workdir import METRICS_FILE, read_metrics

FILE = "best.json"


class BestStep:
    """The best step so far. Every process calls its methods, with the same losses.

    Args:
      start: the step from which the run starts or resumes.
      checkpoints: steps of the checkpoints that there are; the metrics tell the best of those that were evaluated.

    Attributes:
      kept: the steps whose checkpoints are not to be rotated out: the best one's.
    """

    def __init__(self, settings: EvalConfig, workdir: Path, start: int, checkpoints: Collection[int]):
        self._settings, self._workdir, self._start = settings, workdir, start
        self.kept: frozenset[int] = frozenset()
        self._step, self._value = start, math.inf
        for step, value in self._evaluated(workdir, checkpoints) if settings.best else ():
            if value < self._value:
                self._step, self._value, self.kept = step, value, frozenset({step})

    def _evaluated(self, workdir: Path, checkpoints: Collection[int]) -> list[tuple[int, float]]:
        """The steps with a checkpoint, up to `start`, and the loss of each."""
        file, found = workdir / METRICS_FILE, {}
        if jax.process_index() == 0 and file.exists():
            rows = {int(row["step"]): row[self._name] for row in read_metrics(file) if self._name in row}
            found = {str(step): rows[step] for step in checkpoints if step <= self._start and step in rows}
        return sorted((int(step), value) for step, value in distributed.merge_across_processes(found).items())

    @property
    def _name(self) -> str:
        return f"{PREFIX}{self._settings.best}"

    def improves(self, step: int, losses: Mapping[str, float]) -> bool:
        """Whether this step is the best so far, so that it is to be saved; NaN never is."""
        if not self._settings.best or not losses.get(self._name, math.nan) < self._value:
            return False
        self._step, self._value = step, losses[self._name]
        return True

    def ends(self, step: int) -> str:
        """Why the run ends at this step although it could go on, in a line; "" if it goes on."""
        if not self._settings.patience or step - self._step < self._settings.patience:
            return ""
        return (
            f"step {step}: {self._name} has not fallen for {step - self._step} steps (config.eval.patience="
            f"{self._settings.patience}), so the run ends; the best is step {self._step} with {self._value:.4g}"
        )

    def saved(self) -> None:
        """The best step's checkpoint is on disk."""
        self.kept = frozenset({self._step})
        if jax.process_index() == 0:
            best = {"loss": self._name, "step": self._step, "value": self._value}
            replace_text(self._workdir / FILE, json.dumps(best) + "\n")
