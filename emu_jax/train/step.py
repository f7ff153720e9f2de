"""The training step: (state, batch) -> (state, metrics). Pure; compiled once for a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax

from emu_jax.models.paths import join
from emu_jax.train.objective import Batch, Objective
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

Metrics = dict[str, jax.Array]


def make_train_step(
    objective: Objective, config: OptimizerConfig, seed: int
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Builds `train_step`; randomness (dropout, noise) follows from seed and step number alone: resuming repeats it.

    It adds to the objective's metrics, each float32 []:

        grad_norm, grad_norm/<part>   L2 norm of the gradient before clipping, of all parts and of one
        update_norm/<part>            L2 norm of what is subtracted from the parameters, learning rate included
        param_norm/<part>             L2 norm of the trainable parameters before that
        learning_rate/<part>          the part's peak learning rate times the schedule
        ema_decay                     where an EMA is kept
    """
    optimizer = make_optimizer(config)
    trees = (objective.split(tree)[0] for tree in (objective.logical_axes, objective.shapes))
    hyperparameters = config.hyperparameters(*trees)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        grads, metrics, statistics = accumulated_gradients(objective, state, batch, key, config.accumulate_steps)
        grads = mask(grads, hyperparameters)
        trained, others = objective.split(state.params)
        directions, opt_state = optimizer.update(grads, state.opt_state, trained)
        factor = schedule(config, state.step, state.total_steps)
        changes = updates(directions, trained, factor, hyperparameters)
        new = jax.tree.map(lambda param, change: (param - change).astype(param.dtype), trained, changes)
        if config.ema_decay:
            weight = ema_weight(config.ema_decay, state.step)
            statistics = statistics | {"ema": ema_update(state.statistics["ema"], new, weight)}
            metrics |= {"ema_decay": 1.0 - weight}
        metrics |= {"grad_norm": optax.tree.norm(grads)}
        of_parts = {"grad_norm": grads, "update_norm": changes, "param_norm": mask(trained, hyperparameters)}
        metrics |= {f"{name}/{part}": norm for name, tree in of_parts.items() for part, norm in norms(tree).items()}
        metrics |= {f"learning_rate/{part}": peak * factor for part, peak in config.learning_rate}
        return TrainState(state.step + 1, state.total_steps, join(new, others), opt_state, statistics), metrics

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
