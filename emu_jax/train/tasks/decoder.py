"""The visual decoder's U-Net: the noise in an image's latents from the image's embeddings; all else is frozen."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from emu_jax.data.examples import ExamplePipeline, ExamplesConfig, open_examples
from emu_jax.data.latents import CONDITION, ENCODED, Latents
from emu_jax.errors import UserError, check_fields
from emu_jax.generate.conditions import Conditions
from emu_jax.generate.online import OnlineConfig, OnlineExamples
from emu_jax.models import diffusion, unet
from emu_jax.models.flops import unet_forward_flops
from emu_jax.models.layers import Array
from emu_jax.storage import as_path
from emu_jax.train.optimizer import OptimizerConfig
from emu_jax.train.tasks.task import (
    InitPart,
    Inputs,
    OwnRows,
    Task,
    fill_sizes,
    trainable_paths,
    unread_mixture,
)

# Stable Diffusion 1.5 with Emu's embeddings, to plan with where sizes are the data's.
PUBLISHED_SIZES = {"latent_size": 64, "queries": 32}
PUBLISHED_UNET_SIZES = {"latent_channels": 4, "condition_dim": 5120}


@dataclasses.dataclass(frozen=True)
class DecoderLossConfig:
    """`config.loss` of the objective decoder.

    Attributes:
      condition_drop: share of examples whose condition is the unconditional embeddings (the paper: 10%).
      encoded_share: share of examples conditioned on the image's own embeddings instead of those generated from its
        text; the paper uses only generated ones (0).
      min_snr: gamma of min-SNR weighting; 0 weighs all timesteps alike, as published.
    """

    condition_drop: float = 0.1
    encoded_share: float = 0.0
    min_snr: float = 0.0

    def __post_init__(self):
        if not 0 <= self.condition_drop <= 1 or not 0 <= self.encoded_share <= 1 or self.min_snr < 0:
            raise UserError(f"config.loss: {self}; expected shares of 0 to 1 and min_snr of 0 or more")


@dataclasses.dataclass(frozen=True)
class DecoderInputs(Inputs):
    """`Inputs`, and what the decoder's own need.

    Attributes:
      unconditional: the unconditional embeddings, float32 [Q, D].
      conditions: what makes the examples online; None where they are read.
    """

    unconditional: np.ndarray | None = None
    conditions: Conditions | None = None


class TrainDecoder(Task):
    """Predicts the noise in an image's latents from its embeddings, as the paper trains its decoder.

    A batch: latents [B, h, w, C], condition [B, Q, D] (embeddings generated from the text) and, if
    `config.loss.encoded_share` is above 0, encoded [B, Q, D] (the image's own), all float32. The unconditional
    embeddings [Q, D] replace a condition that is dropped.
    """

    holds = "unet"
    init_parts: ClassVar[Mapping[str, InitPart]] = {"unet": InitPart(("unet",), ("unet",))}
    plots: ClassVar[Mapping[str, tuple[str, ...]]] = {"losses": ("noise_error",)}
    row_name = "images"
    summed = frozenset({"loss", "noise_error"})

    def __init__(self, config: ConfigDict, inputs: DecoderInputs | None = None):
        self.config, self.rows = config, config.data.batch
        self.model = unet.UNetConfig.from_dict(config.unet)
        self.remat = self.model.remat
        check_fields(DecoderLossConfig, "config.loss", config.loss)
        self.weights = DecoderLossConfig(**config.loss)
        self.schedule = diffusion.Schedule.from_dict(config.schedule)
        planned = np.zeros((config.queries, self.model.condition_dim), np.float32)
        self.unconditional = jnp.asarray(planned if inputs is None else inputs.unconditional)
        self.logical_axes = {"unet": unet.logical_axes(self.model)}
        self.shapes = {"unet": unet.abstract(self.model)}
        optimizer = OptimizerConfig.from_dict(config.optimizer)
        self.trainable = trainable_paths(self.logical_axes, self.shapes, optimizer)

    @classmethod
    def open(cls, config: ConfigDict, own: OwnRows) -> DecoderInputs:
        online = OnlineConfig.from_dict(config.online)
        share = config.loss.encoded_share
        conditions = online.load(generated=share < 1, encoded=share > 0) if online.model else None
        return cls._open(config, own, conditions)

    @classmethod
    def open_held_out(cls, config: ConfigDict, own: OwnRows, inputs: Inputs) -> DecoderInputs:
        """With the run's frozen parts, which are in memory once."""
        assert isinstance(inputs, DecoderInputs)  # `open` made them
        return cls._open(config, own, inputs.conditions)

    @classmethod
    def _open(cls, config: ConfigDict, own: OwnRows, conditions: Conditions | None) -> DecoderInputs:
        data = ExamplesConfig.from_dict(config.data)

        def opened(source: str, split: str) -> Latents | OnlineExamples:
            if conditions is not None:
                online = OnlineConfig.from_dict(config.online)
                batch = len(own(data.batch))
                return OnlineExamples(conditions, online, source, split, batch=batch, max_faults=data.max_faults)
            return Latents(as_path(source), encoded=config.loss.encoded_share > 0)

        examples, parts = open_examples(data, opened)
        for part in parts:
            (height, _, channels), (queries, dim) = part.latent_shape, part.condition_shape
            sizes = {"latent_size": height, "queries": queries}
            sizes |= {"unet.latent_channels": channels, "unet.condition_dim": dim}
            config = fill_sizes(config, sizes, f"the examples in {part.name} have")
            if not np.allclose(part.unconditional, parts[0].unconditional, atol=1e-4):
                raise UserError(
                    f"config.data.mixture: {part.name} and {parts[0].name} were made by different models; precompute "
                    "them with the same"
                )
        stream = ExamplePipeline(examples, data, own=own(data.batch))
        remarks = tuple(filter(None, [unread_mixture(config), *(part.remark for part in parts)]))
        unconditional = parts[0].unconditional
        return DecoderInputs(config, stream, remarks=remarks, unconditional=unconditional, conditions=conditions)

    @classmethod
    def resolve_without_data(cls, config: ConfigDict, rows: int = 0) -> ConfigDict:
        config = config.copy_and_resolve_references()
        config.data.batch = rows or config.data.batch
        for fields, sizes in ((config, PUBLISHED_SIZES), (config.unet, PUBLISHED_UNET_SIZES)):
            fields.update({name: fields[name] or size for name, size in sizes.items()})
        return config

    def init(self, key: Array) -> tuple[dict, dict]:
        return {"unet": unet.init(self.model, key)}, {}

    def batch_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        side = self.config.latent_size
        condition = jax.ShapeDtypeStruct((self.rows, *self.unconditional.shape), jnp.float32)
        latents = jax.ShapeDtypeStruct((self.rows, side, side, self.model.latent_channels), jnp.float32)
        names = (CONDITION, ENCODED) if self.weights.encoded_share else (CONDITION,)
        return {"latents": latents, **dict.fromkeys(names, condition)}

    def normalisers(self, batch: dict) -> Array:
        return jnp.asarray(float(len(batch["latents"])))

    def loss(self, params: dict, statistics: dict, batch: dict, key: Array, count: Array) -> tuple:
        keys = jax.random.split(key, 4)
        latents = batch["latents"]
        rows = (len(latents), 1, 1)
        condition = batch[CONDITION]
        if self.weights.encoded_share:
            encoded = jax.random.bernoulli(keys[0], self.weights.encoded_share, rows)
            condition = jnp.where(encoded, batch[ENCODED], condition)
        dropped = jax.random.bernoulli(keys[1], self.weights.condition_drop, rows)
        condition = jnp.where(dropped, self.unconditional, condition)  # [B, Q, D]
        timesteps = jax.random.randint(keys[2], rows[:1], 0, self.schedule.train_steps)
        noise = jax.random.normal(keys[3], latents.shape)
        noisy = diffusion.add_noise(self.schedule, latents, noise, timesteps)
        eps = unet.apply(params["unet"], noisy, timesteps, condition, config=self.model)
        error = jnp.square(eps - noise).mean((1, 2, 3))  # [B]
        total = (diffusion.loss_weights(self.schedule, timesteps, self.weights.min_snr) * error).sum() / count
        return total, ({"loss": total, "noise_error": error.sum() / count}, statistics)

    def flops(self) -> dict[str, float]:
        forward = unet_forward_flops(self.model, self.rows, self.config.latent_size, self.config.queries)
        return {part: 3.0 * count for part, count in forward.items()}

    def shallow(self, depths: Mapping[str, int], remat: str | None = None) -> TrainDecoder:
        config = self.config.copy_and_resolve_references()
        config.unet.remat = remat or config.unet.remat
        return type(self)(config)
