"""Bad steps as a person reads them: which steps, which part of the model, which documents; and when a run stops.

In: the metrics of finished steps, and what their rows hold. Out: a line on standard error for each bad step, and one
line for a run that has too many in a row.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from emu_jax.data.pipeline import Stream
from emu_jax.train import distributed

LISTED = 24  # documents that a line names, of all sources together
KINDS = ("param_norm", "grad_norm")  # norms by part that may break, in the order in which a step computes them
MOVED = 0.1  # a part is suspected if a step has changed it by more than this share of its norm

Records = Sequence[Sequence[tuple[int, int]]]  # of a batch's rows, as in `Stream`


class BadStepReport:
    """Reads the metrics of every step once they are computed.

    Args:
      limit: bad steps in a row that stop the run.
      stream: the run's, which names documents.
    """

    def __init__(self, limit: int, stream: Stream):
        self._limit, self._stream = limit, stream
        self._pending: tuple[int, Mapping[str, jax.Array], Records] | None = None
        self._good: Mapping[str, jax.Array] = {}  # metrics of the last good step
        self._bad: dict[int, tuple[str, Records]] = {}  # what broke in the bad steps since, and their records

    @property
    def in_a_row(self) -> bool:
        """Whether the last step that was checked is bad: then the state may be spoilt, though it is finite."""
        return bool(self._bad)

    @property
    def first(self) -> int:
        """The first of the bad steps in a row, which there must be."""
        return min(self._bad)

    def add(self, step: int, metrics: Mapping[str, jax.Array], records: Records) -> None:
        """Takes a step whose metrics may still be being computed."""
        self._pending = step, metrics, records

    def check(self) -> str:
        """Waits for the step that was added last; returns why the run has to stop, "" while it has not to.

        Every process calls it: the line names the documents of all of them.
        """
        if self._pending is None:
            return ""
        (step, metrics, records), self._pending = self._pending, None
        jax.block_until_ready(metrics)
        in_a_row = int(metrics["bad_steps_in_a_row"])
        if not in_a_row:
            self._good, self._bad = metrics, {}
            return ""
        cause = what_broke(jax.device_get(metrics), jax.device_get(self._good))
        self._bad[step] = cause, records
        named = documents(self._named(records))
        tqdm.write(f"step {step} changes nothing: {cause}; its documents: {named}", file=sys.stderr)
        return self._stopped(in_a_row) if in_a_row >= self._limit else ""

    def _stopped(self, in_a_row: int) -> str:
        process = str(jax.process_index())
        own = {str(step): {process: self._named(records)} for step, (_, records) in self._bad.items()}
        merged = distributed.merge_across_processes(own)
        found: dict[str, dict[str, None]] = {}
        for step in sorted(merged, key=int):
            for processes in merged[step].values():
                for source, keys in processes.items():
                    found.setdefault(source, {}).update(dict.fromkeys(keys))
        first, last = self.first, max(self._bad)
        return (
            f"{in_a_row} bad steps in a row, the last one is step {last}: at step {first} {self._bad[first][0]}; they "
            f"changed nothing, and nothing is saved since; documents of these rows: {documents(found)}; lower "
            "config.optimizer.learning_rate of that part, mend the documents, or raise config.train.max_bad_steps"
        )

    def _named(self, records: Records) -> dict[str, list[str]]:
        """Keys by source; few more than a line shows, because a source may have to read them."""
        by_source: dict[int, dict[int, None]] = {}
        for row in records:
            for source, record in row:
                by_source.setdefault(source, {})[record] = None
        names = [
            self._stream.name(source, record) for source, of in by_source.items() for record in [*of][: LISTED + 1]
        ]
        return {source: [key for name, key in names if name == source] for source, _ in names}


def documents(keys: Mapping[str, Iterable[str]]) -> str:
    """Keys by source, as text; of every source the first ones.

    >>> documents({"web": ["a", "b"], "chats": ["c"]})
    'web: a, b; chats: c'
    """
    most = max(LISTED // max(len(keys), 1), 1)
    shown = {source: [*found][: most + 1] for source, found in keys.items()}
    return "; ".join(f"{name}: {', '.join([*of[:most], *['…'] * (len(of) > most)])}" for name, of in shown.items())


def what_broke(metrics: Mapping[str, Any], good: Mapping[str, Any]) -> str:
    """What broke first in a bad step, with the part of the model, as text.

    It is the weights of a part, its gradient or its learning rate. A loss that is not finite breaks the gradients of
    all parts at once; then the part is named, if there is one, that the last good step changed too much.

    >>> what_broke({"loss": 1.0, "grad_norm/causal": 2.0, "grad_norm/llama": math.inf}, {})
    'grad_norm/llama=inf broke first'

    Args:
      good: metrics of the last good step; empty where there is none.
    """
    for kind in KINDS:
        found = _by_part(metrics, kind)
        broken = [f"{kind}/{part}={value:g}" for part, value in found.items() if not math.isfinite(value)]
        if broken and (len(broken) < len(found) or len(found) == 1):
            return f"{' and '.join(broken)} broke first"
        if broken:
            return f"{kind} of all parts broke at once, with loss={metrics['loss']:g}{_suspect(good)}"
    if not math.isfinite(metrics["loss"]):
        return f"loss={metrics['loss']:g}"
    part, rate = max(_by_part(metrics, "learning_rate").items(), key=lambda pair: pair[1])
    if float(rate) ** 2 > float(np.finfo(np.float32).max):
        return f"learning_rate/{part}={rate:g} overflows"
    spike, before = _by_part(metrics, "grad_norm"), _by_part(good, "grad_norm")
    part = max(spike, key=lambda part: spike[part] / (before.get(part) or math.inf))
    ratio = f"grad_norm={metrics['grad_norm']:g} is {metrics['grad_norm_ratio']:.1f} times its running median"
    return f"{ratio}, grad_norm/{part}={spike[part]:g} grew most"


def _suspect(good: Mapping[str, Any]) -> str:
    norms = _by_part(good, "param_norm")
    moved = {part: change / max(norms[part], 1e-30) for part, change in _by_part(good, "update_norm").items()}
    part = max(moved, key=lambda part: moved[part], default="")
    if not part or moved[part] < MOVED:
        return ""
    return f"; the last good step changed {part} by {moved[part]:.3g} times its norm"


def _by_part(metrics: Mapping[str, Any], kind: str) -> dict[str, float]:
    return {name.partition("/")[2]: float(value) for name, value in metrics.items() if name.startswith(f"{kind}/")}
