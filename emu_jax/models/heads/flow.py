"""Flow matching: a small network draws the next embedding from noise, so that several answers can all be likely.

    x_t = (1 - t) noise + t target           t in [0, 1], logit-normal
    loss = |v(x_t, t, hidden) - (target - noise)|^2 / D

Rectified flow (Liu et al. 2022, arXiv 2209.03003; Lipman et al. 2022, arXiv 2210.02747) with the times of Stable
Diffusion 3 (arXiv 2403.03206), by an MLP per embedding with adaptive layer norm, as MAR (Li et al. 2024, arXiv
2406.11838) and NextStep-1 (arXiv 2508.10711) have it. A regression head gives the mean of all likely embeddings, which
may itself be unlikely. Sampling takes Euler steps from t = 0 to 1 with classifier-free guidance over embeddings: the
network also learns v without a hidden state.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float, Key

from emu_jax.errors import UserError
from emu_jax.models.heads.head import HeadLoss, VisualHead
from emu_jax.models.layers import Array, Linear, constant, scan_layers, stack

FREQUENCIES = 64  # of the time embedding
FASTEST = 1000.0  # radians from t = 0 to 1


class FlowBlock(nnx.Module):
    """x + gate * mlp(norm(x) * (1 + scale) + shift); shift, scale and gate come from the condition."""

    def __init__(self, rngs: nnx.Rngs, width: int, dtype: str):
        # Gates begin small, so that the network begins near its skip connections.
        self.modulation = Linear(rngs, width, 3 * width, ("embed", "mlp"), dtype, bias=True, gain=0.1)
        self.up = Linear(rngs, width, 2 * width, ("embed", "mlp"), dtype, bias=True)
        self.down = Linear(rngs, 2 * width, width, ("mlp", "embed"), dtype, bias=True)

    def __call__(
        self, x: Float[Array, "*batch W"], *, condition: Float[Array, "*batch W"], key: None = None
    ) -> Float[Array, "*batch W"]:
        shift, scale, gate = jnp.split(self.modulation(condition), 3, axis=-1)  # [..., W] each
        return x + gate * self.down(jax.nn.silu(self.up(_norm(x) * (1 + scale) + shift)))


def _norm(x: Float[Array, "*batch W"]) -> Float[Array, "*batch W"]:
    """Layer norm without parameters, in float32."""
    y = x.astype(jnp.float32)
    y = y - y.mean(-1, keepdims=True)
    return (y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + 1e-6)).astype(x.dtype)


class FlowNetwork(nnx.Module):
    """v(x, t, hidden): [..., D], [...], [..., D] -> [..., D]."""

    def __init__(self, rngs: nnx.Rngs, width: int, inner: int, blocks: int, dtype: str):
        self.inputs = Linear(rngs, width, inner, ("embed", "mlp"), dtype, bias=True)
        self.time = Linear(rngs, 2 * FREQUENCIES, inner, ("embed", "mlp"), dtype, bias=True)
        self.hidden = Linear(rngs, width, inner, ("embed", "mlp"), dtype, bias=True)
        self.unconditional = constant(0.0, (width,), ("norm",), dtype)  # in the place of a hidden state
        self.blocks = stack(lambda rngs: FlowBlock(rngs, inner, dtype), blocks, rngs)
        self.outputs = Linear(rngs, inner, width, ("mlp", "embed"), dtype, bias=True)

    def condition(self, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch W"]:
        """What a hidden state says, once for all times."""
        return self.hidden(hidden)

    def __call__(
        self, x: Float[Array, "*batch D"], time: Float[Array, "*batch"], condition: Float[Array, "*batch W"]
    ) -> Float[Array, "*batch D"]:
        angles = time[..., None] * jnp.exp(jnp.linspace(0.0, math.log(FASTEST), FREQUENCIES))  # [..., F]
        waves = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1).astype(x.dtype)  # [..., 2F]
        condition = jax.nn.silu(condition + self.time(waves))
        y = self.inputs(x)
        y = scan_layers(self.blocks, y, remat="none", unroll=True, condition=condition)
        return self.outputs(_norm(y))


@dataclasses.dataclass(frozen=True)
class Flow(VisualHead):
    """A flow-matching head.

    Attributes:
      width: Width of the network; 0 means that of the language model.
      blocks: Number of its residual blocks.
      draws: Number of noises and times drawn for each target.
      time_mean, time_std: Mean and standard deviation of logit(t) in training.
      drop_hidden: Share of the draws that learn v without a hidden state.
      steps: Euler steps of a sample.
      guidance: Classifier-free guidance scale of a sample; 1 means none, and costs half.
      target_scale: Targets are divided by it, so that they have about the noise's variance of 1.
    """

    width: int = 0
    blocks: int = 3
    draws: int = 4
    time_mean: float = 0.0
    time_std: float = 1.0
    drop_hidden: float = 0.1
    steps: int = 20
    guidance: float = 1.0
    target_scale: float = 1.0

    differentiable = False  # through all steps of a sample it would be costly

    @property
    def random(self) -> bool:
        return True

    def __post_init__(self):
        at_least = {"width": 0, "blocks": 1, "draws": 1, "steps": 1}
        for name, least in at_least.items():
            if getattr(self, name) < least:
                raise UserError(f"model.visual_head.{name}={getattr(self, name)}; expected {least} or more")
        for name in ("time_std", "target_scale"):
            if not getattr(self, name) > 0:
                raise UserError(f"model.visual_head.{name}={getattr(self, name)}; expected more than 0")
        if not 0 <= self.drop_hidden < 1:
            raise UserError(f"model.visual_head.drop_hidden={self.drop_hidden}; expected 0 to below 1")
        if self.guidance != 1 and not self.drop_hidden:
            raise UserError(
                f"model.visual_head.guidance={self.guidance} needs model.visual_head.drop_hidden above 0: guidance "
                "compares with v without a hidden state, which is not learnt otherwise"
            )

    def make(self, rngs: nnx.Rngs, width: int, dtype: str, init: str) -> nnx.Module:
        return FlowNetwork(rngs, width, self.width or width, self.blocks, dtype)

    def loss(
        self,
        module: Any,
        hidden: Float[Array, "B S D"],
        targets: Float[Array, "B S D"],
        weights: Float[Array, "B S"],
        key: Key[Array, ""],
    ) -> HeadLoss:
        shape = (self.draws, *weights.shape)
        key_noise, key_time, key_drop = jax.random.split(key, 3)
        targets = targets / self.target_scale
        noise = jax.random.normal(key_noise, (self.draws, *targets.shape))  # [N, B, S, D]
        logits = self.time_mean + self.time_std * jax.random.normal(key_time, shape)
        time = jax.nn.sigmoid(logits)  # [N, B, S]
        mixed = (1 - time[..., None]) * noise + time[..., None] * targets  # [N, B, S, D]
        dropped = jax.random.bernoulli(key_drop, self.drop_hidden, shape)[..., None]  # [N, B, S, 1]
        nothing = module.condition(module.unconditional[...].astype(hidden.dtype))  # [W]
        condition = jnp.where(dropped, nothing, module.condition(hidden))  # [N, B, S, W]
        velocity = module(mixed.astype(hidden.dtype), time, condition).astype(jnp.float32)
        terms = jnp.square(velocity - (targets - noise)).mean((0, -1)) * weights  # [B, S]
        return HeadLoss(terms.sum(), terms)

    def sample(self, module: Any, hidden: Float[Array, "B D"], keys: Key[Array, " B"]) -> Float[Array, "B D"]:
        width = hidden.shape[-1]
        noise = jax.vmap(lambda key: jax.random.normal(key, (width,)))(keys)  # [B, D]
        condition = module.condition(hidden)  # [B, W]
        guided = self.guidance != 1
        if guided:
            nothing = module.condition(module.unconditional[...].astype(hidden.dtype))
            condition = jnp.concatenate([condition, jnp.broadcast_to(nothing, condition.shape)])  # [2B, W]

        def step(x: Float[Array, "B D"], time: Float[Array, ""]) -> tuple[Float[Array, "B D"], None]:
            inputs = jnp.concatenate([x, x]) if guided else x
            velocity = module(inputs.astype(hidden.dtype), jnp.full(len(inputs), time), condition).astype(jnp.float32)
            if guided:
                with_hidden, without = jnp.split(velocity, 2)
                velocity = without + self.guidance * (with_hidden - without)
            return x + velocity / self.steps, None

        x, _ = jax.lax.scan(step, noise, jnp.arange(self.steps) / self.steps)
        return (x * self.target_scale).astype(hidden.dtype)

    def multiply_adds(self, width: int) -> float:
        inner = self.width or width
        once = width * inner  # the hidden state
        each = 2 * width * inner + 2 * FREQUENCIES * inner + self.blocks * 7 * inner**2
        return once + self.draws * each
