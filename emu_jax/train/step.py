"""The training step: (state, batch) -> (state, metrics). Pure; compiled once for a run."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax

from emu_jax.models.paths import join
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


def train_step(
    state: TrainState, batch: Batch, *, task: Task, config: OptimizerConfig, seed: int
) -> tuple[TrainState, Metrics]:
    """One update. Randomness (dropout, noise) follows from the seed and the step number, so a resumed run repeats it.

    It adds to the task's metrics, each float32 []:

        grad_norm, grad_norm/<part>   L2 norm of the gradient before clipping, of all parts and of one
        update_norm/<part>            L2 norm of what is subtracted from the parameters, learning rate included
        param_norm/<part>             L2 norm of the trainable parameters before that
        learning_rate/<part>          the part's peak learning rate times the schedule
        ema_decay                     where an EMA is kept
    """
    hyperparameters = config.hyperparameters(*(task.split(tree)[0] for tree in (task.logical_axes, task.shapes)))
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    grads, metrics, statistics = accumulated_gradients(task, state, batch, key, config.accumulate_steps)
    grads = mask(grads, hyperparameters)
    trainable, frozen = task.split(state.params)
    directions, opt_state = make_optimizer(config).update(grads, state.opt_state, trainable)
    factor = schedule(config, state.step, state.total_steps)
    changes = updates(directions, trainable, factor, hyperparameters)
    new = jax.tree.map(lambda param, change: (param - change).astype(param.dtype), trainable, changes)
    if config.ema_decay:
        weight = ema_weight(config.ema_decay, state.step)
        statistics = statistics | {"ema": ema_update(state.statistics["ema"], new, weight)}
        metrics |= {"ema_decay": 1.0 - weight}
    metrics |= {"grad_norm": optax.tree.norm(grads)}
    by_part = {"grad_norm": grads, "update_norm": changes, "param_norm": mask(trainable, hyperparameters)}
    metrics |= {f"{name}/{part}": norm for name, tree in by_part.items() for part, norm in norms(tree).items()}
    metrics |= {f"learning_rate/{part}": peak * factor for part, peak in config.learning_rate}
    return TrainState(state.step + 1, state.total_steps, join(new, frozen), opt_state, statistics), metrics


def compile_step(
    task: Task,
    config: OptimizerConfig,
    seed: int,
    state: TrainState,
    batch: Batch,
    options: Mapping[str, str | bool] | None = None,
) -> jax.stages.Compiled:
    """Compiles `train_step` for a state and a batch, or for their ShapeDtypeStructs; the state is donated.

    Args:
      options: the compiler's.
    """
    # Without `out_shardings` the compiler may choose another layout for the new state: the second step would not fit.
    layout = jax.tree.map(lambda leaf: leaf.sharding, state)
    step = functools.partial(train_step, task=task, config=config, seed=seed)
    lowered = jax.jit(step, donate_argnums=0, out_shardings=(layout, None)).lower(state, batch)
    return lowered.compile(compiler_options=None if options is None else dict(options))


def accumulated_gradients(
    task: Task, state: TrainState, batch: Batch, key: jax.Array, count: int
) -> tuple[dict, Metrics, dict]:
    """Gradients of the whole batch's loss with respect to the trainable parameters, over `count` micro-batches.

    A micro-batch has B / count rows. Each is divided by the whole batch's weights, so that the sum is the whole batch's
    gradient (except for standardised embeddings, whose statistics are those of the micro-batch).
    """
    trainable, frozen = task.split(state.params)
    gradient = jax.grad(lambda trainable, *rest: task.loss(join(trainable, frozen), *rest), has_aux=True)
    normalisers = task.normalisers(batch)
    if count == 1:
        grads, (metrics, statistics) = gradient(trainable, state.statistics, batch, key, normalisers)
        return grads, metrics, statistics

    # Strided rows, so that a micro-batch keeps the batch's sharding over devices: [B, …] -> [count, B/count, …].
    micro = jax.tree.map(lambda x: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1), batch)

    def add(carry: tuple, piece: tuple) -> tuple[tuple, Metrics]:
        grads, statistics = carry
        batch, key = piece
        new, (metrics, statistics) = gradient(trainable, statistics, batch, key, normalisers)
        return (jax.tree.map(jnp.add, grads, new), statistics), metrics

    zeros = jax.tree.map(jnp.zeros_like, trainable)
    (grads, statistics), metrics = jax.lax.scan(add, (zeros, state.statistics), (micro, jax.random.split(key, count)))
    return grads, {k: v.sum(0) if k in task.summed else v.mean(0) for k, v in metrics.items()}, statistics
