"""What a training step changes: step number, parameters, optimizer state and statistics."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from emu_jax.sharding import replicated, tree_shardings
from emu_jax.train.objective import Objective
from emu_jax.train.optimizer import OptimizerConfig, make_optimizer


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrainState:
    """A pytree; `total_steps` is data so that the schedule's length needs no recompilation.

    The optimizer's state is of the parameters that the objective trains. `statistics` are the objective's, and where
    the optimizer keeps one, `ema`: the trained parameters' exponential moving average, float32 whatever their dtype,
    because a change of bfloat16 by a ten-thousandth is no change.
    """

    step: jax.Array  # int32 []
    total_steps: jax.Array  # int32 []
    params: dict[str, Any]
    opt_state: Any
    statistics: dict[str, Any]


def ema_of(trained: dict[str, Any]) -> dict[str, Any]:
    """The EMA of parameters that have not moved yet: a copy in float32."""
    return jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32, copy=True), trained)


def _fresh(objective: Objective, config: OptimizerConfig, seed: int) -> TrainState:
    params, statistics = objective.init(jax.random.key(seed))
    trained, _ = objective.split(params)
    if config.ema_decay:
        statistics = statistics | {"ema": ema_of(trained)}
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        total_steps=jnp.ones((), jnp.int32),
        params=params,
        opt_state=make_optimizer(config).init(trained),
        statistics=statistics,
    )


def abstract_state(objective: Objective, config: OptimizerConfig, mesh: Mesh) -> TrainState:
    """ShapeDtypeStructs with shardings: parameters, moments and EMA by the table, everything else whole."""
    shapes = jax.eval_shape(lambda: _fresh(objective, config, 0))
    params = tree_shardings(mesh, objective.logical_axes, shapes.params)
    trained, _ = objective.split(params)
    whole: Any = replicated(mesh)  # shardings stand where arrays will
    statistics = jax.tree.map(lambda _: whole, shapes.statistics)
    shardings = TrainState(
        step=whole,
        total_steps=whole,
        params=params,
        opt_state=optax.tree.map_params(
            make_optimizer(config),
            lambda _, sharding: sharding,
            shapes.opt_state,
            trained,
            transform_non_params=lambda _: replicated(mesh),
        ),
        statistics=statistics | ({"ema": trained} if config.ema_decay else {}),
    )
    return jax.tree.map(lambda s, d: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=d), shapes, shardings)


def create_state(objective: Objective, config: OptimizerConfig, seed: int, mesh: Mesh) -> TrainState:
    """Fresh state, created already split over the mesh: it never exists whole on one device."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(objective, config, mesh))
    return jax.jit(lambda: _fresh(objective, config, seed), out_shardings=shardings)()
