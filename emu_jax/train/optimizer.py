"""AdamW with a learning rate and weight decay per parameter, gradient clipping, and the exponential moving average.

optax turns gradients into directions; the step multiplies them by the learning rates. These depend on the step and on
the total number of steps as traced values, so that a run that sets its length after timing itself compiles only once.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from emu_jax.errors import UserError, check_fields
from emu_jax.models.paths import flatten, nest
from emu_jax.train import groups
from emu_jax.train.groups import Group, Hyperparameters, part_of


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """`config.optimizer`.

    Attributes:
      learning_rate: peak for each part that the objective trains: vision (with ln_visual), causal and llama; unet; or
        vae. 0 freezes a part: it has no gradient, so that it is not in the clipped norm, and no optimizer state.
      b1, b2, eps: Adam's.
      weight_decay: decay of matrices; norm scales, biases and embeddings have none (`groups.UNDECAYED`).
      clip_norm: clipping threshold for the global gradient norm; 0 turns clipping off.
      skip_spikes: a step whose global gradient norm is above this multiple of its running median changes nothing
        (`bad_steps.py`); 0 skips no finite step.
      warmup_fraction: share of all steps with a linear warm-up from 0.
      final_fraction: where the cosine schedule ends, as a fraction of the peak.
      accumulate_steps: gradient accumulation: micro-batches per step, along the rows; 0: `fit.py` chooses.
      drops: pairs (fraction of all steps, factor of the peak): a staircase schedule instead of the cosine.
      ema_decay: decay of the exponential moving average (EMA) of the trainable parameters; 0 keeps none. `ema_weight`
        describes its start. Loading, exporting and `config.init` use the EMA of a run that keeps one.
      groups: parameters with other settings than their part's, as tuples (pattern, learning rate factor, weight decay,
        frozen). The pattern is a regular expression that must match a parameter's whole path (`re.fullmatch`), as
        `emu-jax inspect` prints it; the first entry that matches counts.

            llama/lm_head/kernel           a parameter
            .*norm.*/scale                 every norm's scale
            vision/blocks/3/.*             layer 3 of a stack, counted from 0; vision/blocks/.* is all of them
            llama/embed/embedding[32000:]  token rows from 32,000 on; [-4:] are the last four

        The factor multiplies the learning rate of the part; a parameter that no entry matches has the factor 1. A
        weight decay of None keeps the default; a number holds for everything that the pattern matches, norms and biases
        included. Frozen parameters (True, or a factor of 0) stay the same bit for bit. A whole frozen parameter has no
        gradient and no optimizer state; frozen layers or token rows have a gradient of 0, already before clipping.

            frozen language model, trained heads and four new token rows
                (("llama/(lm_head|visual_head)/kernel", 1.0, None, False),
                 ("llama/embed/embedding[-4:]", 1.0, None, False), ("llama/.*", 1.0, None, True))
            layer-wise decay of the learning rate over 40 layers
                tuple((f"vision/blocks/{i}/.*", 0.9 ** (40 - i), None, False) for i in range(40))
            frozen norms
                ((".*norm.*", 1.0, None, True), ("ln_visual/.*", 1.0, None, True))
    """

    learning_rate: tuple[tuple[str, float], ...]
    b1: float
    b2: float
    eps: float
    weight_decay: float
    clip_norm: float
    warmup_fraction: float
    final_fraction: float
    accumulate_steps: int
    drops: tuple[tuple[float, float], ...] = ()
    ema_decay: float = 0.0
    groups: tuple[Group, ...] = ()
    skip_spikes: float = 0.0

    def __post_init__(self):
        rates = dict(self.learning_rate)
        if not rates:
            raise UserError("config.optimizer.learning_rate is empty; expected one for each part that is trained")
        ranges = {
            **{f"learning_rate.{part}": (rate, rate >= 0.0, "0 or more") for part, rate in rates.items()},
            "b1": (self.b1, 0.0 <= self.b1 < 1.0, "0 to below 1"),
            "b2": (self.b2, 0.0 <= self.b2 < 1.0, "0 to below 1"),
            "eps": (self.eps, self.eps > 0.0, "more than 0"),
            "weight_decay": (self.weight_decay, self.weight_decay >= 0.0, "0 or more"),
            "clip_norm": (self.clip_norm, self.clip_norm >= 0.0, "0 (no clipping) or more"),
            "warmup_fraction": (self.warmup_fraction, 0.0 <= self.warmup_fraction < 1.0, "0 to below 1"),
            "final_fraction": (self.final_fraction, 0.0 <= self.final_fraction <= 1.0, "0 to 1"),
            "drops": (
                self.drops,
                all(0.0 < at < 1.0 and factor >= 0.0 for at, factor in self.drops)
                and sorted(self.drops) == [*self.drops],
                "rising fractions between 0 and 1, each with a factor of 0 or more",
            ),
            "ema_decay": (self.ema_decay, 0.0 <= self.ema_decay < 1.0, "0 to below 1"),
            "accumulate_steps": (
                self.accumulate_steps,
                self.accumulate_steps >= 0,
                "1 or more, or 0 (chosen by the devices)",
            ),
            "skip_spikes": (
                self.skip_spikes,
                self.skip_spikes == 0.0 or self.skip_spikes > 1.0,
                "0 (none are skipped) or more than 1",
            ),
        }
        for name, (value, valid, expected) in ranges.items():
            if not valid:
                raise UserError(f"config.optimizer.{name}={value}; expected {expected}")

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> OptimizerConfig:
        check_fields(cls, "config.optimizer", fields)
        rates = tuple(sorted(dict(fields["learning_rate"]).items()))
        drops = tuple((float(at), float(factor)) for at, factor in fields.get("drops", ()))
        entries = fields.get("groups", ())
        made = tuple(Group.make(entry, f"config.optimizer.groups[{i}]") for i, entry in enumerate(entries))
        return cls(**(dict(fields) | {"learning_rate": rates, "drops": drops, "groups": made}))

    @property
    def frozen(self) -> frozenset[str]:
        """The parts whose learning rate is 0."""
        return frozenset(part for part, rate in self.learning_rate if not rate)

    def hyperparameters(self, axes: Mapping[str, Any], shapes: Mapping[str, Any]) -> dict[str, Hyperparameters]:
        """The hyperparameters of every parameter, by path.

        Args:
          axes, shapes: trees of the parameters' logical axes, and of leaves with their shapes.
        """
        described = flatten(axes), {path: leaf.shape for path, leaf in flatten(shapes).items()}
        return groups.resolve(self.groups, dict(self.learning_rate), self.weight_decay, *described)

    def check(self, axes: Mapping[str, Any], shapes: Mapping[str, Any]) -> None:
        """Raises UserError unless these settings fit the parameters that the objective trains.

        Each part of them needs a learning rate; other parts may only have 0. Every entry of `groups` must have an
        effect, and at least one parameter must be trained.
        """
        expected, named = {part_of(name) for name in axes}, {name for name, _ in self.learning_rate}
        if named == self.frozen:
            raise UserError("config.optimizer.learning_rate is 0 for every part; nothing would learn")
        if not named - self.frozen <= expected <= named:
            raise UserError(
                f"config.optimizer.learning_rate has {[name for name, _ in self.learning_rate]}; this objective trains "
                f"{', '.join(sorted(expected))}"
            )
        described = flatten(axes), {path: leaf.shape for path, leaf in flatten(shapes).items()}
        groups.check(self.groups, dict(self.learning_rate), *described)


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Clipping and Adam: gradients -> directions. `updates` adds weight decay and multiplies by the learning rate."""
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    return optax.chain(clip, optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps))


def schedule(config: OptimizerConfig, step: jax.Array, total_steps: jax.Array) -> jax.Array:
    """The learning-rate schedule: factor of the peak at `step`, float32 []; linear warm-up, then cosine or drops."""
    progress = (step.astype(jnp.float32) + 1.0) / total_steps.astype(jnp.float32)
    warm = jnp.maximum(config.warmup_fraction, 1e-9)
    cosine = 0.5 * (1.0 + jnp.cos(jnp.pi * jnp.clip((progress - warm) / (1.0 - warm), 0.0, 1.0)))
    decay = config.final_fraction + (1.0 - config.final_fraction) * cosine
    if config.drops:
        decay = jnp.ones(())
        for at, factor in config.drops:
            decay = jnp.where(progress >= at, factor, decay)
    return jnp.where(progress < warm, progress / warm, decay)


def mask(tree: dict, hyperparameters: Mapping[str, Hyperparameters]) -> dict:
    """A tree like the parameters, with 0 at frozen layers and token rows."""

    def masked(path: str, leaf: jax.Array) -> jax.Array:
        trainable = hyperparameters[path].trainable
        return leaf if trainable is None else jnp.where(trainable, leaf, jnp.zeros_like(leaf))

    return nest({path: masked(path, leaf) for path, leaf in flatten(tree).items()})


def updates(directions: dict, params: dict, factor: jax.Array, hyperparameters: Mapping[str, Hyperparameters]) -> dict:
    """What is subtracted from the parameters: learning rate * (direction + weight decay * parameter).

    Args:
      factor: factor of the peak learning rates (`schedule`).
    """

    def update(path: str, direction: jax.Array, param: jax.Array) -> jax.Array:
        found = hyperparameters[path]
        if np.any(found.weight_decay):
            direction = direction + found.weight_decay * param
        return factor * found.learning_rate * direction

    old = flatten(params)
    found = nest({path: update(path, direction, old[path]) for path, direction in flatten(directions).items()})
    return mask(found, hyperparameters)


def norms(tree: dict) -> dict[str, jax.Array]:
    """The L2 norm of each part, float32 []."""
    squares: dict[str, jax.Array] = {}
    for path, leaf in flatten(tree).items():
        square = jnp.square(leaf.astype(jnp.float32)).sum()
        squares[part_of(path)] = squares[part_of(path)] + square if part_of(path) in squares else square
    return {part: jnp.sqrt(square) for part, square in squares.items()}


def ema_weight(decay: float, step: jax.Array) -> jax.Array:
    """Weight in the EMA of the parameters after update `step` = 0, 1, …, float32 []: (1 - d) / (1 - d^(step + 1)).

    This is the bias correction of Adam's moments: the EMA is the normalised exponential kernel d^age over the steps so
    far. The weight starts at 1, so that the initial parameters have none, and falls to 1 - d. The EMA's decay at `step`
    is 1 minus the weight.
    """
    # 1 - d^n without cancellation, for d near 1 and any n.
    grown = -jnp.expm1((step.astype(jnp.float32) + 1.0) * math.log(decay))
    return jnp.where(step == 0, 1.0, jnp.minimum((1.0 - decay) / grown, 1.0))


def ema_update(ema: dict, params: dict, weight: jax.Array) -> dict:
    """The EMA, float32, after one more step: ema + weight * (params - ema).

    decay * ema + weight * params would be biased: rounded to float32, decay and weight do not add up to 1.
    """

    def update(old: jax.Array, new: jax.Array) -> jax.Array:
        new = new.astype(old.dtype)
        return jnp.where(weight >= 1.0, new, old + weight * (new - old))

    return jax.tree.map(update, ema, params)
