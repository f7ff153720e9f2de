"""The training loop: config and work directory -> a trained checkpoint, metrics and plots.

workdir/ config.json  checkpoints/<step>/  metrics.jsonl  tensorboard/  plots/
"""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from emu_jax.config import from_json, to_json
from emu_jax.data.packing import batch_metrics
from emu_jax.data.pipeline import DataConfig, Pipeline, train_tokenizer
from emu_jax.data.tokenizer import Tokenizer
from emu_jax.errors import UserError
from emu_jax.models import emu
from emu_jax.train.checkpoint import Checkpoints
from emu_jax.train.mesh import batch_shardings, make_mesh
from emu_jax.train.metrics import MetricsWriter, plot_metrics
from emu_jax.train.optimizer import OptimizerConfig, make_optimizer
from emu_jax.train.state import TrainState, abstract_state, create_state
from emu_jax.train.step import make_train_step

log = logging.getLogger(__name__)

# Fields that may differ when a work directory is resumed: they change what is observed, not what is learnt.
OBSERVING = {"train.log_every", "train.checkpoint_every", "train.keep_checkpoints", "train.mesh"}
MEASURED_STEPS = 24  # timed to turn minutes into steps

Step = Callable[[TrainState, emu.Batch], tuple[TrainState, dict[str, jax.Array]]]


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """`config.train`; `steps` or `minutes` is 0, the other says how long to train."""

    steps: int
    minutes: float
    seed: int
    log_every: int
    checkpoint_every: int
    keep_checkpoints: int
    mesh: Any

    def __post_init__(self):
        if (self.steps > 0) == (self.minutes > 0) and self.steps <= 0:
            raise UserError("config.train.steps and config.train.minutes are both 0; set one of them")
        for name in ("log_every", "checkpoint_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise UserError(f"config.train.{name}={getattr(self, name)}; expected at least 1")


def train(config: ConfigDict, workdir: Path) -> TrainState:
    """Trains `config` in `workdir`, or continues there from its newest checkpoint.

    Where a run starts, first that applies:
      1. the newest checkpoint in workdir/checkpoints (parameters, optimizer, step, position in the data);
      2. fresh parameters from config.train.seed.

    Raises:
      UserError: a setting cannot work, or the work directory belongs to another config.
    """
    began = time.monotonic()
    # ---- settings: everything that can be refused is refused here -------------------------------------------------
    settings = TrainConfig(**dict(config.train))
    data = DataConfig.from_dict(config.data)
    optimizer_config = OptimizerConfig.from_dict(config.optimizer)
    optimizer = make_optimizer(optimizer_config)
    image_size, queries = config.model.vision.image_size, config.model.causal.queries
    tokenizer = make_tokenizer(config, data)
    model = make_model_config(config, tokenizer)
    mesh = make_mesh(settings.mesh)
    if data.batch_rows % optimizer_config.accumulate_steps:
        raise UserError(
            f"config.data.batch_rows={data.batch_rows} does not divide by "
            f"config.optimizer.accumulate_steps={optimizer_config.accumulate_steps}"
        )
    pipeline = Pipeline(
        data,
        tokenizer,
        queries=queries,
        image_size=image_size,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    claim_workdir(workdir, config)
    ids = emu.SpecialIds(tokenizer.pad_id, tokenizer.img_id, tokenizer.img_end_id, tokenizer.image_id)
    checkpoints = Checkpoints(workdir, keep=settings.keep_checkpoints)

    with jax.set_mesh(mesh):
        # ---- state: restored or fresh -----------------------------------------------------------------------------
        if checkpoints.latest_step() is None:
            state = create_state(model, optimizer, settings.seed, mesh)
        else:
            target = abstract_state(model, optimizer, mesh)
            state, position = checkpoints.restore(target, tokenizer.fingerprint)
            pipeline.set_state(position)
            log.info("resumed %s at step %d", workdir, int(state.step))
        start = int(state.step)

        # ---- compile: one shape, one program ----------------------------------------------------------------------
        position = pipeline.get_state()
        first = next(pipeline)
        pipeline.set_state(position)
        shardings = batch_shardings(mesh, first)
        step_fn = make_train_step(model, ids, optimizer_config, optimizer, settings.seed)
        compiled = jax.jit(step_fn, donate_argnums=0).lower(state, _put(first, shardings)).compile()
        log.info("compiled the step in %.1f s", time.monotonic() - began)

        # ---- how long ---------------------------------------------------------------------------------------------
        fresh = checkpoints.latest_step() is None
        if fresh:
            total = settings.steps
            if not total:
                total = measure_steps(compiled, state, _put(first, shardings), settings.minutes * 60, began)
            state = dataclasses.replace(state, total_steps=jnp.asarray(total, jnp.int32, device=state.step.sharding))
            checkpoints.save(state, to_json(config), tokenizer, pipeline.get_state())
        total = int(state.total_steps)

        # ---- train ------------------------------------------------------------------------------------------------
        writer = MetricsWriter(workdir, start=start, total=total)
        flops = 3 * sum(
            emu.forward_flops(model, data.batch_rows * data.row_images, data.batch_rows, data.row_tokens).values()
        )
        interval = _Interval()
        for step in range(start + 1, total + 1):
            batch = interval.next_batch(pipeline)
            state, metrics = compiled(state, _put(batch, shardings))
            writer.advance()
            if step % settings.log_every == 0 or step == total:
                row = {name: float(value) for name, value in jax.device_get(metrics).items()}
                writer.write(step, row | interval.finish(flops) | {"split_documents": pipeline.split_documents})
            if step % settings.checkpoint_every == 0 or step == total:
                checkpoints.save(state, to_json(config), tokenizer, pipeline.get_state())

        # ---- close: a full disk shows when the last save is waited for ---------------------------------------------
        writer.close()
        checkpoints.close()
        pipeline.close()
    if jax.process_index() == 0:
        plot_metrics(workdir)
    return state


def make_tokenizer(config: ConfigDict, data: DataConfig) -> Tokenizer:
    """The .model file that the config names, or one trained from the source's texts."""
    settings = config.tokenizer
    if settings.path:
        return Tokenizer.load(Path(settings.path))
    size = config.model.vision.image_size
    return train_tokenizer(data, size, vocab_size=settings.vocab_size, model_type=settings.model_type)


def make_model_config(config: ConfigDict, tokenizer: Tokenizer) -> emu.EmuConfig:
    """`config.model` with its vocabulary size filled in (0 means the tokenizer's) or checked."""
    if config.model.llama.vocab_size == 0:
        config.model.llama.vocab_size = tokenizer.vocab_size
    model = emu.EmuConfig.from_dict(config.model)
    if model.llama.vocab_size != tokenizer.vocab_size:
        raise UserError(
            f"config.model.llama.vocab_size={model.llama.vocab_size}, but the tokenizer has {tokenizer.vocab_size} tokens; "
            "set it to that, or to 0 to take the tokenizer's"
        )
    return model


def claim_workdir(workdir: Path, config: ConfigDict) -> None:
    """Writes workdir/config.json, or checks that the one there is of the same experiment."""
    file = workdir / "config.json"
    if not file.exists():
        if workdir.exists() and not workdir.is_dir():
            raise UserError(f"--workdir {workdir}: a file of that name exists; name a folder")
        workdir.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".partial")
        partial.write_text(to_json(config) + "\n", encoding="utf-8")
        partial.replace(file)
        return
    old, new = (
        _flat(json.loads(text)) for text in (to_json(from_json(file.read_text(encoding="utf-8"))), to_json(config))
    )
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name) and not any(name.startswith(prefix) for prefix in OBSERVING):
            raise UserError(
                f"--workdir {workdir}: it belongs to another config: {name} is {old.get(name)!r} there and {new.get(name)!r} "
                "here; use a new work directory"
            )


def _flat(tree: dict, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def _put(batch: dict[str, np.ndarray], shardings: dict[str, Any]) -> emu.Batch:
    """This host's rows of a batch -> global arrays on the mesh."""
    return emu.Batch(**{k: jax.make_array_from_process_local_data(shardings[k], v) for k, v in batch.items()})


def measure_steps(compiled: Step, state: TrainState, batch: emu.Batch, seconds: float, began: float) -> int:
    """How many steps fill `seconds` since `began`: times real steps on a copy of the state, which stays untouched."""
    copy = jax.tree.map(jnp.copy, dataclasses.replace(state, total_steps=state.total_steps + MEASURED_STEPS))
    times = []
    for _ in range(MEASURED_STEPS):
        started = time.monotonic()
        copy, metrics = compiled(copy, batch)
        jax.block_until_ready(metrics)
        times.append(time.monotonic() - started)
    left = seconds - (time.monotonic() - began)
    # The mean of the later half: what the steps really take on a shared machine, without the first ones' page faults.
    return max(MEASURED_STEPS, int(left / np.mean(times[MEASURED_STEPS // 2 :])))


class _Interval:
    """Times and batch statistics between two logged steps."""

    def __init__(self):
        self._start, self._wait, self._batches = time.monotonic(), 0.0, []

    def next_batch(self, pipeline: Pipeline) -> dict[str, np.ndarray]:
        started = time.monotonic()
        batch = next(pipeline)
        self._wait += time.monotonic() - started
        self._batches.append(batch_metrics(batch))
        return batch

    def finish(self, flops: float) -> dict[str, float]:
        """Means over the interval, which then starts anew."""
        seconds, count = time.monotonic() - self._start, len(self._batches)
        mean = {name: float(np.mean([b[name] for b in self._batches])) for name in self._batches[0]}
        row = {
            "pad_fraction": mean["pad_fraction"],
            "slot_occupancy": mean["slot_occupancy"],
            "tokens_per_s": mean["tokens"] * count / seconds,
            "pictures_per_s": mean["pictures"] * count / seconds,
            "step_ms": 1e3 * seconds / count,
            "input_wait_ms": 1e3 * self._wait / count,
            "compute_ms": 1e3 * (seconds - self._wait) / count,
            "model_gflop_per_s": flops * count / seconds / 1e9,
        }
        self.__init__()
        return row
