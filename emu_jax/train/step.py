"""The training step: (state, batch) -> (state, metrics). Pure; compiled once for a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax

from emu_jax.models.paths import join
from emu_jax.train.objective import Batch, Objective
from emu_jax.train.optimizer import OptimizerConfig, apply_updates, learning_rates, make_optimizer
from emu_jax.train.state import TrainState

Metrics = dict[str, jax.Array]


def make_train_step(
    objective: Objective, config: OptimizerConfig, seed: int
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Builds `train_step`; randomness (dropout, noise) follows from seed and step number alone: resuming repeats it."""
    optimizer = make_optimizer(config)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        grads, metrics, statistics = accumulated_gradients(objective, state, batch, key, config.accumulate_steps)
        trained, others = objective.split(state.params)
        directions, opt_state = optimizer.update(grads, state.opt_state, trained)
        rates = learning_rates(config, state.step, state.total_steps)
        trained = apply_updates(trained, directions, rates)
        if config.ema_decay:
            statistics = statistics | {"ema": average(state.statistics["ema"], trained, config.ema_decay, state.step)}
        metrics |= {"grad_norm": optax.tree.norm(grads)}
        metrics |= {f"learning_rate_{part}": rate for part, rate in rates.items()}
        params = join(trained, others)
        return TrainState(state.step + 1, state.total_steps, params, opt_state, statistics), metrics

    return train_step


def compile_step(
    objective: Objective,
    config: OptimizerConfig,
    seed: int,
    state: TrainState,
    batch: Batch,
    options: Mapping[str, str | bool] | None = None,
) -> jax.stages.Compiled:
    """The step's executable for a state and a batch, or for descriptions of them; the state is donated.

    `options` are the compiler's.
    """
    # Without `out_shardings` the compiler may lay the new state out otherwise, and the second step would not fit.
    layout = jax.tree.map(lambda leaf: leaf.sharding, state)
    step = jax.jit(make_train_step(objective, config, seed), donate_argnums=0, out_shardings=(layout, None))
    return step.lower(state, batch).compile(compiler_options=None if options is None else dict(options))


def average(old: dict, new: dict, decay: float, step: jax.Array) -> dict:
    """Exponential moving average of parameters; early steps average over fewer, so that the start is forgotten."""
    decay = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda a, b: (decay * a + (1.0 - decay) * b).astype(a.dtype), old, new)


def accumulated_gradients(
    objective: Objective, state: TrainState, batch: Batch, key: jax.Array, count: int
) -> tuple[dict, Metrics, dict]:
    """Gradients of the whole batch's loss by what is trained, taken over `count` micro-batches of B / count rows.

    Every micro-batch is divided by the whole batch's weights, so the sum is the whole batch's gradient (but for
    standardised embeddings, whose statistics are a micro-batch's own).
    """
    trained, others = objective.split(state.params)
    gradient = jax.grad(lambda trained, *rest: objective.loss(join(trained, others), *rest), has_aux=True)
    normalisers = objective.normalisers(batch)
    if count == 1:
        grads, (metrics, statistics) = gradient(trained, state.statistics, batch, key, normalisers)
        return grads, metrics, statistics

    # Strided rows, so that a micro-batch keeps the batch's sharding over devices: [B, …] -> [count, B/count, …].
    micro = jax.tree.map(lambda x: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1), batch)

    def add(carry: tuple, piece: tuple) -> tuple[tuple, Metrics]:
        grads, statistics = carry
        batch, key = piece
        new, (metrics, statistics) = gradient(trained, statistics, batch, key, normalisers)
        return (jax.tree.map(jnp.add, grads, new), statistics), metrics

    zeros = jax.tree.map(jnp.zeros_like, trained)
    (grads, statistics), metrics = jax.lax.scan(add, (zeros, state.statistics), (micro, jax.random.split(key, count)))
    return grads, {k: v.sum(0) if k in objective.summed else v.mean(0) for k, v in metrics.items()}, statistics
