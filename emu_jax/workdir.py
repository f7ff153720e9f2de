"""The files of a training work directory that other commands read."""

from __future__ import annotations

import json

from ml_collections import ConfigDict

from emu_jax.errors import UserError
from emu_jax.storage import Path, read_json_object

CONFIG_FILE = "config.json"
METRICS_FILE = "metrics.jsonl"
HISTORY_FILE = "history.jsonl"
# Fields that may differ when a work directory is resumed: they change what is observed, and how a step is computed on
# the devices at hand, not what is learnt.
OBSERVING = (
    *("train.log_every", "train.max_bad_steps", "train.mesh", "train.tuned", "train.fits"),
    *("optimizer.accumulate_steps", "model.vision.remat", "model.causal.remat", "model.llama.remat"),
    *("train.checkpoint_every", "train.checkpoint_minutes", "train.keep_checkpoints", "train.keep_every"),
    *("train.save_timeout_minutes", "eval"),
)


def check_scheme(workdir: Path) -> None:
    """Raises UserError for a work directory in a bucket that cannot hold one."""
    if str(workdir).startswith("s3://"):
        raise UserError(
            f"workdir={workdir}: Orbax writes no checkpoints to s3://; name a local folder, or a gs:// bucket"
        )


def with_recorded_shards(config: ConfigDict, workdir: Path) -> ConfigDict:
    """The config with the number of shards that the run's first start chose, where `config.data.shards` is 0.

    A run that resumes on another number of devices keeps its stream.
    """
    file = workdir / CONFIG_FILE
    if config.data.get("shards", None) != 0 or not file.exists():
        return config
    recorded = read_json_object(file, "the config that `emu-jax train` wrote")
    config = config.copy_and_resolve_references()
    config.data.shards = recorded.get("data", {}).get("shards", 0)
    return config


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The rows of a metrics.jsonl, without a last line that a kill cut short."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows
