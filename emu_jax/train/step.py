"""The training step: (state, batch) -> (state, metrics), compiled once for a run.

Without gradient accumulation it is one program, `train_step`. With it, the host runs two: `add_micro_batch` for every
micro-batch, and `update`. In between it can hear that it should stop. Replicas of the parameters (`sharding.REPLICAS`)
add up their own gradients, which are reduced over them once a step, in `update`: between slices the network is slow.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from emu_jax.models.paths import join
from emu_jax.sharding import REPLICAS
from emu_jax.train.bad_steps import judge, select
from emu_jax.train.optimizer import (
    OptimizerConfig,
    ema_update,
    ema_weight,
    make_optimizer,
    mask,
    norms,
    schedule,
    updates,
)
from emu_jax.train.state import TrainState
from emu_jax.train.tasks.task import Batch, Task

Metrics = dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Sums:
    """A pytree: what the micro-batches of a step have added up to.

    Attributes:
      loss: [].
      grads: gradients, a tree like the trainable parameters; of every replica, [R, …], where there are replicas.
      metrics: the task's, each [].
      statistics: the task's after the last micro-batch, without the EMA.
    """

    loss: jax.Array
    grads: dict[str, Any]
    metrics: Metrics
    statistics: dict[str, Any]


def train_step(
    state: TrainState, batch: Batch, *, task: Task, config: OptimizerConfig, seed: int
) -> tuple[TrainState, Metrics]:
    """One update from a whole batch, without micro-batches.

    Randomness (dropout, noise) follows from the seed and the step number, so a resumed run repeats it. A bad step
    (`bad_steps.py`) changes nothing but the step number and the counts of bad steps.

    The update adds to the task's metrics, each float32 []:

        loss                          the loss
        grad_norm, grad_norm/<part>   L2 norm of the gradient before clipping, of all parts and of one
        update_norm/<part>            L2 norm of what a good step subtracts from the parameters, learning rate included
        param_norm/<part>             L2 norm of the trainable parameters before that
        learning_rate/<part>          the part's peak learning rate times the schedule
        ema_decay                     where an EMA is kept
        bad_steps                     bad steps of the run so far, this one included
        bad_steps_in_a_row            bad steps up to this one without a good one in between
        grad_norm_ratio               grad_norm over its running median, where spikes are skipped; 0 at first
    """
    statistics = _without_ema(state.statistics)
    return update(
        state,
        _gradients(task, state, statistics, batch, _key(seed, state), task.normalisers(batch)),
        task=task,
        config=config,
    )


def add_micro_batch(
    sums: Sums, state: TrainState, batch: Batch, number: jax.Array, *, task: Task, count: int, seed: int
) -> tuple[Sums, jax.Array]:
    """Adds micro-batch `number` of `count` to the sums, which the first one starts anew.

    A micro-batch has B / count rows. Each is divided by the whole batch's weights, so that the sum is the whole batch's
    gradient (except for standardised embeddings, whose statistics are those of the micro-batch).

    Returns:
      The sums, and the sum of the losses; the host may wait for it while the sums are donated to the next micro-batch.
    """

    def piece(x: jax.Array) -> jax.Array:
        # Strided rows, so that a micro-batch keeps the batch's sharding over devices: [B, …] -> [B/count, …].
        return jax.lax.dynamic_index_in_dim(x.reshape(-1, count, *x.shape[1:]), number, axis=1, keepdims=False)

    first = number == 0
    statistics = select(first, _without_ema(state.statistics), sums.statistics)
    key = jax.random.split(_key(seed, state), count)[number]
    new = _by_replica(task, state, statistics, jax.tree.map(piece, batch), key, task.normalisers(batch))
    old = jax.tree.map(lambda leaf: jnp.where(first, jnp.zeros_like(leaf), leaf), sums)
    added = dataclasses.replace(jax.tree.map(jnp.add, old, new), statistics=new.statistics)
    return added, added.loss


def update(state: TrainState, sums: Sums, *, task: Task, config: OptimizerConfig) -> tuple[TrainState, Metrics]:
    """The update from the gradients of a whole batch; see `train_step`."""
    hyperparameters = config.hyperparameters(*(task.split(tree)[0] for tree in (task.logical_axes, task.shapes)))
    count = config.accumulate_steps
    metrics = {name: value if name in task.summed else value / count for name, value in sums.metrics.items()}
    metrics |= {"loss": sums.loss}
    grads = mask(sums.grads, hyperparameters)
    trainable, frozen = task.split(state.params)
    directions, opt_state = make_optimizer(config).update(grads, state.opt_state, trainable)
    factor = schedule(config, state.step, state.total_steps)
    changes = updates(directions, trainable, factor, hyperparameters)
    by_part = {"grad_norm": grads, "update_norm": changes, "param_norm": mask(trainable, hyperparameters)}
    metrics |= {"grad_norm": optax.tree.norm(grads)}
    metrics |= {f"{name}/{part}": norm for name, tree in by_part.items() for part, norm in norms(tree).items()}
    metrics |= {f"learning_rate/{part}": peak * factor for part, peak in config.learning_rate}

    # Adam's directions are of the order of 1: an update overflows where the square of its rate does. To judge the norm
    # of the update itself would take another pass over all parameters.
    squares = (jnp.square(peak * factor) for _, peak in config.learning_rate)
    numbers = [metrics["grad_norm"], sums.loss, *squares]
    good, bad_steps, counts = judge(state.bad_steps, state.step, numbers, config.skip_spikes)
    metrics |= counts
    new = jax.tree.map(lambda param, change: (param - change).astype(param.dtype), trainable, changes)
    statistics = sums.statistics
    if config.ema_decay:
        weight = ema_weight(config.ema_decay, state.step)
        statistics = statistics | {"ema": ema_update(state.statistics["ema"], new, weight)}
        metrics |= {"ema_decay": 1.0 - weight}
    new, opt_state, statistics = select(
        good, (new, opt_state, statistics), (trainable, state.opt_state, state.statistics)
    )
    return TrainState(state.step + 1, state.total_steps, join(new, frozen), opt_state, statistics, bad_steps), metrics


def _key(seed: int, state: TrainState) -> jax.Array:
    return jax.random.fold_in(jax.random.key(seed), state.step)


def _without_ema(statistics: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in statistics.items() if name != "ema"}


def _gradients(
    task: Task, state: TrainState, statistics: dict[str, Any], batch: Batch, key: jax.Array, normalisers: Any
) -> Sums:
    """One (micro-)batch's loss and its gradients with respect to the trainable parameters."""
    trainable, frozen = task.split(state.params)
    gradient = jax.value_and_grad(lambda trainable, *rest: task.loss(join(trainable, frozen), *rest), has_aux=True)
    (loss, (metrics, statistics)), grads = gradient(trainable, statistics, batch, key, normalisers)
    return Sums(loss, grads, metrics, statistics)


def _replica_axes(task: Task) -> tuple[str, ...]:
    """The mesh axes over which micro-batches' gradients are not reduced."""
    mesh = jax.sharding.get_abstract_mesh()
    return () if task.rows_mix else tuple(axis for axis in REPLICAS if mesh.shape.get(axis, 1) > 1)


def _by_replica(
    task: Task, state: TrainState, statistics: dict[str, Any], batch: Batch, key: jax.Array, normalisers: Any
) -> Sums:
    """As `_gradients`, with the gradients of each replica's rows apart: [R, …].

    Each replica draws its own randomness, so that dropout depends on the number of replicas.
    """
    axes = _replica_axes(task)
    if not axes:
        return _gradients(task, state, statistics, batch, key, normalisers)

    def own(state: TrainState, statistics: dict, batch: Batch, key: jax.Array, normalisers: Any) -> Sums:
        key = jax.random.fold_in(key, jax.lax.axis_index(axes))
        found = _gradients(task, state, statistics, batch, key, normalisers)
        metrics = {
            name: (jax.lax.psum if name in task.summed else jax.lax.pmean)(value, axes)
            for name, value in found.metrics.items()
        }
        grads = jax.tree.map(lambda leaf: leaf[None], found.grads)
        statistics = jax.tree.map(lambda leaf: jax.lax.pmean(leaf, axes), found.statistics)
        return Sums(jax.lax.psum(found.loss, axes), grads, metrics, statistics)

    everywhere, split = PartitionSpec(), PartitionSpec(axes)
    mapped = jax.shard_map(
        own,
        in_specs=(everywhere, everywhere, split, everywhere, everywhere),
        out_specs=Sums(everywhere, split, everywhere, everywhere),  # type: ignore[arg-type]  # a prefix of the tree
        axis_names=set(axes),
        check_vma=False,
    )
    return mapped(state, statistics, batch, key, normalisers)


def _reduced(sums: Sums, task: Task) -> Sums:
    """The sums with the gradients added up over replicas."""
    if not _replica_axes(task):
        return sums
    return dataclasses.replace(sums, grads=jax.tree.map(lambda leaf: leaf.sum(0), sums.grads))


# ---- programs --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Program:
    """A program of the step, not yet compiled. Its arguments are all that is kept between the step's programs.

    Attributes:
      name: what it does.
      times: how often it runs in a step.
    """

    name: str
    times: int
    lowered: jax.stages.Lowered

    def compile(self, options: Mapping[str, str | bool] | None = None) -> jax.stages.Compiled:
        """Compiles it with these options of the compiler."""
        return self.lowered.compile(compiler_options=None if options is None else dict(options))


def programs(task: Task, config: OptimizerConfig, seed: int, state: TrainState, batch: Batch) -> list[Program]:
    """The step's programs for a state and a batch, or for their ShapeDtypeStructs, in the order in which they run."""
    # Without `out_shardings` the compiler may choose another layout for the new state: the second step would not fit.
    layout = jax.tree.map(lambda leaf: leaf.sharding, state)
    count = config.accumulate_steps
    if count == 1:
        step = functools.partial(train_step, task=task, config=config, seed=seed)
        compiled = jax.jit(step, donate_argnums=0, out_shardings=(layout, None))
        return [Program("step", 1, compiled.lower(state, batch))]
    sums = abstract_sums(task, state, batch)
    number = jax.ShapeDtypeStruct((), jnp.int32, sharding=state.step.sharding)
    kept = jax.tree.map(lambda leaf: leaf.sharding, sums)
    add = functools.partial(add_micro_batch, task=task, count=count, seed=seed)
    adding = jax.jit(add, donate_argnums=0, out_shardings=(kept, None), keep_unused=True)

    def put(state: TrainState, sums: Sums) -> tuple[TrainState, Metrics]:
        return update(state, _reduced(sums, task), task=task, config=config)

    updating = jax.jit(put, donate_argnums=0, out_shardings=(layout, None), keep_unused=True)
    return [
        Program("add_micro_batch", count, adding.lower(sums, state, batch, number)),
        Program("update", 1, updating.lower(state, sums)),
    ]


def abstract_sums(task: Task, state: TrainState, batch: Batch) -> Sums:
    """ShapeDtypeStructs with shardings: gradients like parameters, statistics as in the state, the rest replicated.

    Of every replica's gradients, a device holds its own: as many bytes as if there were one.
    """
    axes = _replica_axes(task)

    def shapes(state: TrainState, batch: Batch) -> Sums:
        key, statistics = jax.random.key(0), _without_ema(state.statistics)
        return _by_replica(task, state, statistics, batch, key, task.normalisers(batch))

    def described(shape: Any, like: Any) -> Any:
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=like.sharding)

    def gradient(shape: Any, like: Any) -> Any:
        where = like.sharding
        if axes:
            where = NamedSharding(where.mesh, PartitionSpec(axes, *where.spec))
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=where)

    found = jax.eval_shape(shapes, state, batch)
    return Sums(
        loss=described(found.loss, state.step),
        grads=jax.tree.map(gradient, found.grads, task.split(state.params)[0]),
        metrics={name: described(value, state.step) for name, value in found.metrics.items()},
        statistics=jax.tree.map(described, found.statistics, _without_ema(state.statistics)),
    )


class Step:
    """The compiled step; the state is donated.

    Args:
      executables: those of `programs`.
      sums: `abstract_sums`; None without gradient accumulation.
    """

    def __init__(self, executables: Sequence[jax.stages.Compiled], count: int, sums: Sums | None):
        self.executables, self._count, self._abstract = executables, count, sums
        self._sums: Any = None
        self._numbers: list[jax.Array] = []

    def __call__(
        self, state: TrainState, batch: Batch, stop: Callable[[], bool] = lambda: False
    ) -> tuple[TrainState, Metrics | None]:
        """One step, dispatched; its results may still be computed when this returns.

        Args:
          stop: asked between micro-batches; True drops the step.

        Returns:
          The new state and the metrics; of a step that was dropped, the state that was given, and None.
        """
        if self._count == 1:
            return self.executables[0](state, batch)
        add, update = self.executables
        if self._sums is None:
            self._sums = jax.tree.map(
                lambda leaf: jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding), self._abstract
            )
            self._numbers = [jnp.asarray(n, jnp.int32, device=state.step.sharding) for n in range(self._count)]
        previous = None
        for number in range(self._count):
            self._sums, loss = add(self._sums, state, batch, self._numbers[number])
            jax.block_until_ready(previous)  # otherwise micro-batches would pile up on the device
            previous = loss
            if number + 1 < self._count and stop():
                return state, None
        return update(state, self._sums)


def compile_step(
    task: Task,
    config: OptimizerConfig,
    seed: int,
    state: TrainState,
    batch: Batch,
    options: Mapping[str, str | bool] | None = None,
) -> Step:
    """Compiles the step for a state and a batch, or for their ShapeDtypeStructs.

    Args:
      options: the compiler's.
    """
    executables = [program.compile(options) for program in programs(task, config, seed, state, batch)]
    sums = abstract_sums(task, state, batch) if config.accumulate_steps > 1 else None
    return Step(executables, config.accumulate_steps, sums)
