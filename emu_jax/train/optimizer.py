"""AdamW with a learning rate for each part of the model, clipping, and which parameters decay.

optax turns gradients into directions; the step multiplies them by `learning_rates`, which depend on the step and the
total number of steps as traced values: a run that fixes its length after measuring itself compiles only once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from emu_jax.errors import UserError, check_fields

# Top level of the parameters -> the part whose learning rate it takes.
PARTS = {
    "vision": "vision",
    "ln_visual": "vision",
    "causal": "causal",
    "llama": "llama",
    "unet": "unet",
    "vae": "vae",
}

# Norm scales, biases and tables that are looked up (positions, tokens, queries, relative bias) do not decay.
UNDECAYED = frozenset(
    {"scale", "bias", "q_bias", "v_bias", "cls_token", "pos_embed", "queries", "relative_bias", "embedding"}
)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """`config.optimizer`.

    Attributes:
      learning_rate: peak for each part the objective trains: vision (with ln_visual), causal and llama; unet; or vae.
        0 freezes a part: it has no gradient, which also leaves it out of the clipped norm, and no optimizer state.
      warmup_fraction: of all steps, linear from 0. final_fraction: of the peak, where the cosine ends.
      clip_norm: of the global gradient norm; 0 turns clipping off.
      accumulate_steps: micro-batches a step, along the rows.
      drops: pairs (fraction of all steps, factor of the peak): a staircase instead of the cosine.
      ema_decay: of a running average of the parameters, which is what gets used; 0 keeps none.
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

    def __post_init__(self):
        rates = dict(self.learning_rate)
        unknown = set(rates) - set(PARTS.values())
        if unknown or not rates:
            raise UserError(
                f"config.optimizer.learning_rate has {sorted(unknown or rates)}; expected some of "
                f"{', '.join(sorted(set(PARTS.values())))}"
            )
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
            "accumulate_steps": (self.accumulate_steps, self.accumulate_steps >= 1, "1 or more"),
        }
        for name, (value, valid, expected) in ranges.items():
            if not valid:
                raise UserError(f"config.optimizer.{name}={value}; expected {expected}")

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> OptimizerConfig:
        check_fields(cls, "config.optimizer", fields)
        rates = tuple(sorted(dict(fields["learning_rate"]).items()))
        drops = tuple((float(at), float(factor)) for at, factor in fields.get("drops", ()))
        return cls(**(dict(fields) | {"learning_rate": rates, "drops": drops}))

    @property
    def frozen(self) -> frozenset[str]:
        """The parts whose learning rate is 0."""
        return frozenset(part for part, rate in self.learning_rate if not rate)

    def check_parts(self, params: Mapping[str, Any]) -> None:
        """Raises unless there is a learning rate for each part of these parameters, and for no other but 0."""
        expected, named = {PARTS[name] for name in params}, {name for name, _ in self.learning_rate}
        if named == self.frozen:
            raise UserError("config.optimizer.learning_rate is 0 for every part; nothing would learn")
        if not named - self.frozen <= expected <= named:
            raise UserError(
                f"config.optimizer.learning_rate has {[name for name, _ in self.learning_rate]}; this objective trains "
                f"{', '.join(sorted(expected))}"
            )


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Gradients -> update directions of AdamW, to be multiplied by -learning rate."""

    def decays(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key not in UNDECAYED, params)

    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    return optax.chain(
        clip,
        optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps),
        optax.add_decayed_weights(config.weight_decay, mask=decays),
    )


def schedule(config: OptimizerConfig, step: jax.Array, total_steps: jax.Array) -> jax.Array:
    """Factor of the peak at `step` of `total_steps`, float32 []: linear warm-up, then cosine or drops."""
    progress = (step.astype(jnp.float32) + 1.0) / total_steps.astype(jnp.float32)
    warm = jnp.maximum(config.warmup_fraction, 1e-9)
    cosine = 0.5 * (1.0 + jnp.cos(jnp.pi * jnp.clip((progress - warm) / (1.0 - warm), 0.0, 1.0)))
    decay = config.final_fraction + (1.0 - config.final_fraction) * cosine
    if config.drops:
        decay = jnp.ones(())
        for at, factor in config.drops:
            decay = jnp.where(progress >= at, factor, decay)
    return jnp.where(progress < warm, progress / warm, decay)


def learning_rates(config: OptimizerConfig, step: jax.Array, total_steps: jax.Array) -> dict[str, jax.Array]:
    """The learning rate of every part at `step`; float32 []."""
    factor = schedule(config, step, total_steps)
    return {name: peak * factor for name, peak in config.learning_rate}


def apply_updates(params: dict, directions: dict, rates: Mapping[str, jax.Array]) -> dict:
    """params - rate of its part * direction, for every part of the tree."""

    def update(part: str) -> dict:
        rate = rates[PARTS[part]]
        return jax.tree.map(lambda p, d: (p - rate * d).astype(p.dtype), params[part], directions[part])

    return {part: update(part) for part in params}
