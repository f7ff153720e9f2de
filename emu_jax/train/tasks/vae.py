"""The visual decoder's VAE: images through a noisy bottleneck (Kingma and Welling 2014)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from emu_jax.data.examples import ExamplePipeline, ExamplesConfig, Images
from emu_jax.errors import UserError, check_fields
from emu_jax.models import vae
from emu_jax.models.layers import Array
from emu_jax.train.optimizer import OptimizerConfig
from emu_jax.train.tasks.task import Inputs, OwnRows, Task, trainable_paths

LATENT_SQUARE_DECAY = 0.99  # of the running mean square of the latents, a step


@dataclasses.dataclass(frozen=True)
class VAELossConfig:
    """`config.loss` of the objective vae: loss weights beside the absolute error's 1."""

    squared_weight: float = 1.0
    kl_weight: float = 1e-3

    def __post_init__(self):
        if min(self.squared_weight, self.kl_weight) < 0:
            raise UserError(f"config.loss: {self}; expected weights of 0 or more")


class TrainVAE(Task):
    """Reconstructs images: |error| + error² + KL. A batch: pixels, uint8 [B, H, W, 3].

    The statistics hold the running mean square of the latents, from which the scale of a trained VAE follows.
    """

    holds = "vae"
    plots: ClassVar[Mapping[str, tuple[str, ...]]] = {"losses": ("absolute_error", "squared_error", "kl")}
    row_name = "images"
    summed = frozenset({"loss", "absolute_error", "squared_error", "kl"})

    def __init__(self, config: ConfigDict, inputs: Inputs | None = None):
        self.config, self.rows = config, config.data.batch
        self.model = vae.VAEConfig.from_dict(config.vae)
        check_fields(VAELossConfig, "config.loss", config.loss)
        self.weights = VAELossConfig(**config.loss)
        self.logical_axes, self.shapes = {"vae": vae.logical_axes(self.model)}, {"vae": vae.abstract(self.model)}
        optimizer = OptimizerConfig.from_dict(config.optimizer)
        self.trainable = trainable_paths(self.logical_axes, self.shapes, optimizer)

    @classmethod
    def open(cls, config: ConfigDict, own: OwnRows) -> Inputs:
        data = ExamplesConfig.from_dict(config.data)
        reduction = vae.VAEConfig.from_dict(config.vae).reduction
        if config.image_size < 1 or config.image_size % reduction:
            raise UserError(f"config.image_size={config.image_size}; this VAE needs a multiple of {reduction}")
        images = Images(data.source, data.split, config.image_size)
        return Inputs(config.copy_and_resolve_references(), ExamplePipeline(images, data, own=own(data.batch)))

    def init(self, key: Array) -> tuple[dict, dict]:
        return {"vae": vae.init(self.model, key)}, {"latent_square": jnp.ones(())}

    def normalisers(self, batch: dict) -> Array:
        return jnp.asarray(float(len(batch["pixels"])))

    def loss(self, params: dict, statistics: dict, batch: dict, key: Array, count: Array) -> tuple:
        images = vae.normalise(batch["pixels"])  # [B, H, W, 3]
        mean, log_variance = vae.encode(params["vae"], images, config=self.model)  # [B, h, w, C]
        latents = mean + jnp.exp(0.5 * log_variance) * jax.random.normal(key, mean.shape)
        error = vae.decode(params["vae"], latents * self.model.scale, config=self.model) - images
        kl = 0.5 * (jnp.square(mean) + jnp.exp(log_variance) - 1.0 - log_variance)
        share = len(images) / count
        parts = {
            "absolute_error": share * jnp.abs(error).mean(),
            "squared_error": share * jnp.square(error).mean(),
            "kl": share * kl.mean(),
        }
        squared_weight, kl_weight = self.weights.squared_weight, self.weights.kl_weight
        total = parts["absolute_error"] + squared_weight * parts["squared_error"] + kl_weight * parts["kl"]
        square = jax.lax.stop_gradient(jnp.square(mean).mean())
        decay = LATENT_SQUARE_DECAY
        statistics = statistics | {"latent_square": decay * statistics["latent_square"] + (1.0 - decay) * square}
        return total, (parts | {"loss": total}, statistics)
