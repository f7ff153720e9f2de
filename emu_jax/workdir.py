"""The files of a training work directory that other commands read."""

from __future__ import annotations

import json

from emu_jax.storage import Path

CONFIG_FILE = "config.json"
METRICS_FILE = "metrics.jsonl"
HISTORY_FILE = "history.jsonl"
# Fields that may differ when a work directory is resumed: they change what is observed, not what is learnt.
OBSERVING = (
    *("train.log_every", "train.mesh", "train.tuned"),
    *("train.checkpoint_every", "train.checkpoint_minutes", "train.keep_checkpoints", "train.keep_every"),
    "train.save_timeout_minutes",
)


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The rows of a metrics.jsonl, without a last line that a kill cut short."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows
