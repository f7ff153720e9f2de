"""What may differ when a run is resumed: fields that are only observed, and those that are changed on purpose.

A change is recorded in the work directory: `config.json` is the config from then on, and `history.jsonl` says since
which step:

    {"step": 4000, "time": 1790000000.0, "change": {"optimizer.learning_rate.llama": [0.0001, 3e-05]}}
    {"step": 6000, "time": 1790003600.0, "skipped_windows": 2}
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Collection, Mapping
from typing import Any

from emu_jax.errors import UserError
from emu_jax.models.paths import flatten
from emu_jax.storage import Path, replace_text
from emu_jax.workdir import HISTORY_FILE, OBSERVING

# Fields that a run may change: none of them decides the state's shape, nor which documents there are.
CHANGEABLE = (
    *("optimizer.learning_rate", "optimizer.b1", "optimizer.b2", "optimizer.eps"),
    *("optimizer.weight_decay", "optimizer.clip_norm"),
    *("optimizer.warmup_fraction", "optimizer.final_fraction", "optimizer.drops", "train.steps"),
    "optimizer.skip_spikes",
)
MIXTURE_WEIGHT = re.compile(r"data\.mixture\.[^.]+\.weight")
# Why other fields may not change, by the groups that hold them; the first that fits counts.
REASONS = {
    "train.minutes": "they became a number of steps at the first start; change them to 0, and train.steps",
    "train": "the steps so far depend on it",
    "optimizer": "the optimizer's state depends on it",
    "data": "the saved position in the data depends on it",
    "tokenizer": "the token embeddings depend on it",
    "init": "only the first start of a run reads it",
    "": "the parameters depend on it",
}

Fields = dict[str, Any]
Differences = dict[str, tuple[Any, Any]]  # field -> its value there and here


def fields_of(config: Mapping[str, Any]) -> Fields:
    """A config's fields by their names with dots, as JSON gives them."""
    return {name.replace("/", "."): value for name, value in flatten(dict(config)).items()}


def differences(there: Fields, here: Fields) -> Differences:
    """The fields that differ, apart from those that are only observed."""
    names = sorted(there.keys() | here.keys())
    found = {name: (there.get(name), here.get(name)) for name in names if not _within(name, OBSERVING)}
    return {name: values for name, values in found.items() if values[0] != values[1]}


def _within(name: str, groups: Collection[str]) -> bool:
    return any(name == group or name.startswith(group + ".") for group in groups)


def is_changeable(name: str) -> bool:
    """Whether a resumed run may change this field on purpose.

    >>> is_changeable("optimizer.learning_rate.llama"), is_changeable("data.mixture.mmc4.weight")
    (True, True)
    >>> is_changeable("model.llama.width")
    False
    """
    return _within(name, CHANGEABLE) or MIXTURE_WEIGHT.fullmatch(name) is not None


def check_change(name: str, there: Any, here: Any) -> None:
    """Raises UserError unless a run may change this field from one value to the other."""
    if name == "train.minutes" and not here:
        return  # they became a number of steps at the first start, which train.steps changes
    if not is_changeable(name) and not _within(name, OBSERVING):
        reason = next(why for group, why in REASONS.items() if not group or _within(name, (group,)))
        raise UserError(f"change: {name} cannot change within a run: {reason}; use a new work directory")
    # With 0, a part is frozen and has no optimizer state, a source is not read, and no norms of spikes are kept.
    groups = ("optimizer.learning_rate", "optimizer.skip_spikes")
    if (_within(name, groups) or MIXTURE_WEIGHT.fullmatch(name)) and (not there or not here):
        raise UserError(
            f"change: {name} cannot change from {there} to {here} within a run: with 0 its state is another; choose a "
            "small value, or use a new work directory"
        )


def changed_mixture(found: Differences) -> bool:
    return any(MIXTURE_WEIGHT.fullmatch(name) for name in found)


def record(workdir: Path, step: int, found: Differences, skipped_windows: int) -> None:
    """Adds a line to the work directory's history."""
    file = workdir / HISTORY_FILE
    before = file.read_text(encoding="utf-8") if file.exists() else ""
    line: dict[str, Any] = {"step": step, "time": time.time()}
    line |= {"change": {name: list(values) for name, values in found.items()}} if found else {}
    line |= {"skipped_windows": skipped_windows} if skipped_windows else {}
    replace_text(file, before + json.dumps(line) + "\n")
