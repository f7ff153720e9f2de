"""The diffusion process of the visual decoder: a schedule of added noise, which the U-Net learns to predict.

noisy = sqrt(alpha_bar[t]) * latents + sqrt(1 - alpha_bar[t]) * noise        (Ho et al. 2020, arXiv 2006.11239)
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from emu_jax.errors import UserError, build
from emu_jax.models.layers import Array


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Stable Diffusion's "scaled linear" schedule: sqrt(beta) rises linearly over the training steps.

    >>> Schedule().alphas_bar[[0, 999]].round(4).tolist()
    [0.9991, 0.0047]

    Attributes:
      train_steps: T, the number of timesteps, which are 0 .. T-1.
      beta_start, beta_end: Variance of the added noise at the first and the last timestep.
      offset: Added to every sampling timestep (`steps_offset` in the published files).
    """

    train_steps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    offset: int = 1

    def __post_init__(self):
        if self.train_steps < 2 or not 0 < self.beta_start <= self.beta_end < 1 or self.offset < 0:
            raise UserError(
                f"schedule: train_steps={self.train_steps}, beta_start={self.beta_start}, beta_end={self.beta_end}, "
                f"offset={self.offset}; expected at least 2, 0 < beta_start <= beta_end < 1, and 0 or more"
            )

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Schedule:
        """Builds and validates from `config.schedule` (a ConfigDict or a plain dict)."""
        return build(cls, "schedule", fields)

    @functools.cached_property
    def alphas_bar(self) -> np.ndarray:
        """alpha_bar [T], the latents' share of the variance at each timestep; float64."""
        # Rounded to float32 at the same places as in the published scheduler.
        roots = np.linspace(self.beta_start**0.5, self.beta_end**0.5, self.train_steps, dtype=np.float32)
        return np.cumprod(1.0 - np.square(roots), dtype=np.float32).astype(np.float64)


def add_noise(
    schedule: Schedule, latents: Float[Array, "B h w C"], noise: Float[Array, "B h w C"], timesteps: Int[Array, " B"]
) -> Float[Array, "B h w C"]:
    """Noisy latents at each example's timestep, float32."""
    alphas_bar = jnp.asarray(schedule.alphas_bar, jnp.float32)[timesteps][:, None, None, None]
    return jnp.sqrt(alphas_bar) * latents + jnp.sqrt(1.0 - alphas_bar) * noise


def loss_weights(schedule: Schedule, timesteps: Int[Array, " B"], min_snr: float) -> Float[Array, " B"]:
    """Min-SNR weight of each example's squared error: min(snr, gamma) / snr (arXiv 2303.09556), or 1 if gamma is 0.

    gamma is `min_snr`, and snr = alpha_bar / (1 - alpha_bar): easy, nearly noiseless timesteps get less weight.
    """
    if not min_snr:
        return jnp.ones(timesteps.shape, jnp.float32)
    snr = jnp.asarray(schedule.alphas_bar / (1.0 - schedule.alphas_bar), jnp.float32)[timesteps]
    return jnp.minimum(snr, min_snr) / snr
