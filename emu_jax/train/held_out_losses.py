"""`config.eval`: the losses of held-out data while a run trains, of the EMA where the run keeps one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from emu_jax.errors import UserError, check_fields
from emu_jax.observation import Observation
from emu_jax.train.global_batch import own_rows, place_batch
from emu_jax.train.tasks.task import Inputs, Task

PREFIX = "held_out_"  # of a held-out loss's name
FREE = {"max_padding": 1.0, "workers": 0}  # fields of `config.data` that a few batches do without


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """`config.eval`.

    Attributes:
      every: interval in steps; the last step is evaluated too. 0 evaluates nothing.
      source, split, mixture: the held-out data, as in `config.data`; what is empty there is the run's own. A split
        replaces that of every source.
      batches: how many batches of them, the same ones every time.
      best: a loss of theirs, such as loss or text_loss/pairs: the checkpoint of the step where it is lowest is kept,
        and best.json names it (`best_step.py`); empty: none.
      patience: number of steps without a lower one after which the run ends; 0: it never does.
    """

    every: int = 0
    source: str = ""
    split: str = ""
    mixture: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    batches: int = 8
    best: str = ""
    patience: int = 0

    def __post_init__(self):
        for name, least in (("every", 0), ("batches", 1), ("patience", 0)):
            if getattr(self, name) < least:
                raise UserError(f"config.eval.{name}={getattr(self, name)}; expected at least {least}")
        if self.every and not (self.source or self.split or self.mixture):
            raise UserError(
                f"config.eval.every={self.every}: the run's own data would be evaluated; set config.eval.split, source "
                "or mixture"
            )
        if self.best and not self.every:
            raise UserError(f"config.eval.best={self.best}: nothing is evaluated; set config.eval.every")
        if self.patience and not self.best:
            raise UserError(
                f"config.eval.patience={self.patience}: name the loss that is waited for in config.eval.best"
            )

    @classmethod
    def of(cls, config: ConfigDict) -> EvalConfig:
        """That of a run's config; a config without one evaluates nothing."""
        fields = config.get("eval", {})
        check_fields(cls, "config.eval", fields)
        return cls(**dict(fields))

    def data(self, data: ConfigDict) -> ConfigDict:
        """`config.data` of the held-out data."""
        data = data.copy_and_resolve_references()
        data.update({name: value for name, value in FREE.items() if name in data})
        if self.source or self.mixture:
            data.source, data.mixture = self.source, ConfigDict(dict(self.mixture))
        if self.split:
            data.split = self.split
            for entry in data.get("mixture", {}).values():
                entry.split = self.split
        return data


class HeldOutLosses:
    """Measures the task's losses, and those by source, on the first batches of held-out data.

    Args:
      inputs: the run's.

    Raises:
      UserError: the held-out data cannot be read.
    """

    def __init__(self, settings: EvalConfig, task: Task, inputs: Inputs, mesh: Mesh):
        config = inputs.config.copy_and_resolve_references()
        config.data = settings.data(config.data)
        held_out = type(task).open_held_out(config, lambda rows: own_rows(mesh, rows), inputs)
        self._settings, self._mesh, self._stream = settings, mesh, held_out.stream
        self._task = type(task)(held_out.config, held_out)
        self._start = self._stream.get_state()
        self._measure = jax.jit(self._task.held_out_metrics)
        self._losses = {"loss", *self._task.plots.get("losses", ())}
        known = sorted(self._losses | {name for name in self._task.summed if name.partition("/")[0] in self._losses})
        if settings.best and settings.best not in known:
            raise UserError(
                f"config.eval.best={settings.best}: no such loss of the held-out data; choose one of {', '.join(known)}"
            )

    def __call__(self, step: int, params: dict[str, Any], statistics: dict[str, Any]) -> Observation:
        self._stream.set_state(self._start)
        found: list[dict[str, float]] = []
        for number in range(self._settings.batches):
            batch = self._task.batch(**place_batch(self._mesh, self._task.rows, next(self._stream)))
            metrics = self._measure(params, statistics, batch, jax.random.key(number))
            found.append({name: float(value) for name, value in jax.device_get(metrics).items()})
        shown = self._losses | {*self._task.held_out_only}
        names = [name for name in found[0] if name.partition("/")[0] in shown]
        # A batch has NaN for a source of which it has nothing; NaN of all sources is the model's, and stays.
        values = {n: [row[n] for row in found if "/" not in n or not np.isnan(row[n])] for n in names}
        return Observation({f"{PREFIX}{name}": float(np.mean(some)) for name, some in values.items() if some})

    def close(self) -> None:
        self._stream.close()
