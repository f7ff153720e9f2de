"""The training step: (state, batch) -> (state, metrics). Pure; compiled once for a run."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from emu_jax.models import emu
from emu_jax.train.optimizer import OptimizerConfig, apply_updates, learning_rates
from emu_jax.train.state import TrainState

Metrics = dict[str, jax.Array]


def make_train_step(
    model: emu.EmuConfig,
    ids: emu.SpecialIds,
    config: OptimizerConfig,
    optimizer: optax.GradientTransformation,
    seed: int,
) -> Callable[[TrainState, emu.Batch], tuple[TrainState, Metrics]]:
    """Builds `train_step`; randomness (dropout) follows from seed and step number alone, so resuming repeats it."""
    random = model.causal.dropout > 0 or model.vision.drop_path > 0

    def loss(params: dict, statistics: dict, batch: emu.Batch, key: jax.Array, normalisers: tuple) -> tuple:
        return emu.loss(
            params,
            statistics,
            batch,
            config=model,
            ids=ids,
            key=key if random else None,
            normalisers=normalisers,
        )

    def train_step(state: TrainState, batch: emu.Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        grads, metrics, statistics = accumulated_gradients(loss, state, batch, key, config.accumulate_steps)
        directions, opt_state = optimizer.update(grads, state.opt_state, state.params)
        rates = learning_rates(config, state.step, state.total_steps)
        params = apply_updates(state.params, directions, rates)
        metrics |= {"grad_norm": optax.tree.norm(grads)}
        metrics |= {f"learning_rate_{part}": rate for part, rate in rates.items()}
        return TrainState(state.step + 1, state.total_steps, params, opt_state, statistics), metrics

    return train_step


def accumulated_gradients(
    loss: Callable, state: TrainState, batch: emu.Batch, key: jax.Array, count: int
) -> tuple[dict, Metrics, dict]:
    """Gradients of the whole batch's loss, taken over `count` micro-batches of B / count rows.

    Every micro-batch is divided by the whole batch's weights, so the sum is the whole batch's gradient (but for
    standardised embeddings, whose statistics are a micro-batch's own).
    """
    gradient = jax.grad(loss, has_aux=True)
    normalisers = emu.loss_weights(batch)
    if count == 1:
        grads, (metrics, statistics) = gradient(state.params, state.statistics, batch, key, normalisers)
        return grads, metrics, statistics

    # Strided rows, so that a micro-batch keeps the batch's sharding over devices: [B, …] -> [count, B/count, …].
    micro = jax.tree.map(lambda x: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1), batch)

    def add(carry: tuple, piece: tuple) -> tuple[tuple, Metrics]:
        grads, statistics = carry
        batch, key = piece
        new, (metrics, statistics) = gradient(state.params, statistics, batch, key, normalisers)
        return (jax.tree.map(jnp.add, grads, new), statistics), metrics

    zeros = jax.tree.map(jnp.zeros_like, state.params)
    (grads, statistics), metrics = jax.lax.scan(add, (zeros, state.statistics), (micro, jax.random.split(key, count)))
    summed = {"loss", "text_loss", "regression_loss"}
    return grads, {k: v.sum(0) if k in summed else v.mean(0) for k, v in metrics.items()}, statistics
