"""What a training step changes: step number, parameters, optimizer state, statistics and counts of bad steps."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from emu_jax.models.paths import flatten, nest
from emu_jax.sharding import replicated, tree_shardings
from emu_jax.train import bad_steps
from emu_jax.train.optimizer import OptimizerConfig, make_optimizer
from emu_jax.train.tasks.task import Task


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrainState:
    """A pytree.

    Attributes:
      step: steps done, int32 [].
      total_steps: length of the schedule, int32 []; data, so that another length needs no compilation.
      params: all parameters, frozen ones included.
      opt_state: optax state of the trainable parameters.
      statistics: the task's. With `optimizer.ema_decay` also `ema`, the exponential moving average of the trainable
        parameters: float32 whatever their dtype, because bfloat16 rounds away a change of a ten-thousandth.
      bad_steps: their counts (`bad_steps.py`).
    """

    step: jax.Array
    total_steps: jax.Array
    params: dict[str, Any]
    opt_state: Any
    statistics: dict[str, Any]
    bad_steps: bad_steps.BadSteps


def ema_of(trainable: dict[str, Any]) -> dict[str, Any]:
    """The EMA of parameters before their first update: a copy in float32."""
    return jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32, copy=True), trainable)


def _fresh(task: Task, config: OptimizerConfig, seed: int) -> TrainState:
    params, statistics = task.init(jax.random.key(seed))
    trainable, _ = task.split(params)
    if config.ema_decay:
        statistics = statistics | {"ema": ema_of(trainable)}
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        total_steps=jnp.ones((), jnp.int32),
        params=params,
        opt_state=make_optimizer(config).init(trainable),
        statistics=statistics,
        bad_steps=bad_steps.initial(config.skip_spikes),
    )


def averaged(state: TrainState) -> tuple[dict[str, Any], dict[str, Any]]:
    """The parameters that a run is judged by, their EMA where it keeps one; and the task's statistics."""
    statistics = {name: value for name, value in state.statistics.items() if name != "ema"}
    if "ema" not in state.statistics:
        return state.params, statistics
    params = flatten(state.params)
    ema = {path: leaf.astype(params[path].dtype) for path, leaf in flatten(state.statistics["ema"]).items()}
    return nest(params | ema), statistics


def abstract_state(task: Task, config: OptimizerConfig, mesh: Mesh) -> TrainState:
    """ShapeDtypeStructs with shardings: parameters, moments and EMA by the logical axis rules, the rest replicated."""
    shapes = jax.eval_shape(lambda: _fresh(task, config, 0))
    params = tree_shardings(mesh, task.logical_axes, shapes.params)
    trainable, _ = task.split(params)
    whole: Any = replicated(mesh)  # a sharding in the place of an array
    statistics = jax.tree.map(lambda _: whole, shapes.statistics)
    shardings = TrainState(
        step=whole,
        total_steps=whole,
        params=params,
        opt_state=optax.tree.map_params(
            make_optimizer(config),
            lambda _, sharding: sharding,
            shapes.opt_state,
            trainable,
            transform_non_params=lambda _: replicated(mesh),
        ),
        statistics=statistics | ({"ema": trainable} if config.ema_decay else {}),
        bad_steps=dict.fromkeys(shapes.bad_steps, whole),
    )
    return jax.tree.map(lambda s, d: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=d), shapes, shardings)


def create_state(task: Task, config: OptimizerConfig, seed: int, mesh: Mesh) -> TrainState:
    """A fresh state, initialised in its shardings: no device ever holds all of it."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(task, config, mesh))
    return jax.jit(lambda: _fresh(task, config, seed), out_shardings=shardings)()
