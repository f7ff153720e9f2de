"""Tasks for tests, made from a model and settings without any data."""

import dataclasses
import functools
from collections.abc import Callable

import jax
from ml_collections import ConfigDict

from emu_jax.models import emu
from emu_jax.models.losses import SourceWeights
from emu_jax.train.optimizer import OptimizerConfig
from emu_jax.train.state import TrainState
from emu_jax.train.step import Step, compile_step, train_step
from emu_jax.train.tasks.interleaved import PLANNED_IDS, Interleaved
from emu_jax.train.tasks.pretrain import Pretrain
from emu_jax.train.tasks.task import Batch, Task
from tests.train import tiny


def interleaved(
    model: emu.EmuConfig,
    ids: emu.SpecialIds = PLANNED_IDS,
    optimizer: OptimizerConfig | None = None,
    *,
    kind: type[Interleaved] = Pretrain,
    sources: tuple[SourceWeights, ...] = (),
) -> Interleaved:
    """A task of this model on interleaved documents; None: with the optimizer of `tiny`."""
    config = tiny.get_config()
    config.model = ConfigDict(model.to_dict())
    if optimizer is not None:
        groups = tuple(dataclasses.astuple(group) for group in optimizer.groups)
        config.optimizer = ConfigDict(
            vars(optimizer) | {"learning_rate": dict(optimizer.learning_rate), "groups": groups}
        )
    task = kind(config)
    task.ids, task.sources = ids, sources
    return task


def step_of(task: Task, optimizer: OptimizerConfig, seed: int = 0) -> Callable:
    """`train_step` of a task: (state, batch) -> (state, metrics)."""
    return functools.partial(train_step, task=task, config=optimizer, seed=seed)


def compiled_step(task: Task, optimizer: OptimizerConfig, state: TrainState, batch: Batch, seed: int = 0) -> Step:
    """The step as a run compiles it, with its micro-batches; the state is donated."""
    described = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), batch)
    return compile_step(task, optimizer, seed, state, described)
