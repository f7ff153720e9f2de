"""What a training step changes: step number, parameters, optimizer state and embedding statistics."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from emu_jax.models import emu
from emu_jax.train.mesh import replicated, tree_shardings


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrainState:
    """A pytree; `total_steps` is data so that the schedule's length needs no recompilation."""

    step: jax.Array  # int32 []
    total_steps: jax.Array  # int32 []
    params: dict[str, Any]
    opt_state: Any
    statistics: dict[str, jax.Array]


def _fresh(config: emu.EmuConfig, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    params = emu.init(config, jax.random.key(seed))
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        total_steps=jnp.ones((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        statistics=emu.initial_statistics(config),
    )


def abstract_state(config: emu.EmuConfig, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """ShapeDtypeStructs with shardings: parameters and moments by the table, everything else whole."""
    shapes = jax.eval_shape(lambda: _fresh(config, optimizer, 0))
    params = tree_shardings(mesh, emu.logical_axes(config), shapes.params)
    shardings = TrainState(
        step=replicated(mesh),
        total_steps=replicated(mesh),
        params=params,
        opt_state=optax.tree.map_params(
            optimizer,
            lambda _, sharding: sharding,
            shapes.opt_state,
            params,
            transform_non_params=lambda _: replicated(mesh),
        ),
        statistics=jax.tree.map(lambda _: replicated(mesh), shapes.statistics),
    )
    return jax.tree.map(lambda s, d: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=d), shapes, shardings)


def create_state(config: emu.EmuConfig, optimizer: optax.GradientTransformation, seed: int, mesh: Mesh) -> TrainState:
    """Fresh state, created already split over the mesh: it never exists whole on one device."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, optimizer, mesh))
    return jax.jit(lambda: _fresh(config, optimizer, seed), out_shardings=shardings)()
