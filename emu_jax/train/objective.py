"""What a run learns: fresh parameters, how they are split over the mesh, and the loss of a batch.

The loop, the step, the state and the checkpoints are the same for all four:

    pretrain   Emu itself, the interleaved-sequence loss             configs/quickstart.py
    instruct   low-rank adapters of Emu's language model             configs/instruct.py
    vae        the visual decoder's VAE, from images alone         configs/vae.py
    decoder    the visual decoder's U-Net, everything else frozen    configs/decoder.py
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from emu_jax.checkpoints.store import Holds
from emu_jax.errors import UserError
from emu_jax.models import diffusion, emu, lora, unet, vae
from emu_jax.models.layers import Array
from emu_jax.models.losses import SourceWeights
from emu_jax.models.paths import split
from emu_jax.train.optimizer import OptimizerConfig

Batch = Any  # a pytree of arrays [B, …]


@dataclasses.dataclass(frozen=True)
class Objective:
    """Pure functions, and the fields of a batch.

    Attributes:
      holds: what a checkpoint of the run holds (`store.Holds`).
      init: key -> (parameters by part, statistics). Statistics are what training tracks but does not differentiate.
      logical_axes, shapes: trees like the parameters, the latter of ShapeDtypeStructs.
      loss: (params, statistics, batch, key, normalisers) -> (loss, (metrics, new statistics)).
      normalisers: of a whole batch; micro-batches are divided by them and their losses add up to the whole batch's.
      summed: the metrics that are such losses; the others are averaged over micro-batches.
      batch: makes the batch from its arrays by name.
      trains: the paths of the parameters that are trained; the others have no gradient and no optimizer state.
    """

    holds: Holds
    init: Callable[[Array], tuple[dict, dict]]
    logical_axes: dict
    shapes: dict
    loss: Callable[[dict, dict, Batch, Array, Any], tuple[Array, tuple[dict, dict]]]
    normalisers: Callable[[Batch], Any]
    summed: frozenset[str]
    batch: Callable[..., Batch] = dict
    trains: Callable[[str], bool] = lambda path: True

    def split(self, params: dict) -> tuple[dict, dict]:
        """Parameters, or a tree like them, -> the trained ones and the others."""
        return split(params, self.trains)


def freeze(goal: Objective, optimizer: OptimizerConfig) -> Objective:
    """The same, but that it leaves out what the optimizer's settings freeze as a whole.

    Raises:
      UserError: these settings are not for what the objective trains (`OptimizerConfig.check`).
    """
    trees = [goal.split(tree)[0] for tree in (goal.logical_axes, goal.shapes)]
    optimizer.check(*trees)
    found = optimizer.hyperparameters(*trees)
    trained = frozenset(path for path, hyperparameters in found.items() if not hyperparameters.frozen)
    return dataclasses.replace(goal, trains=trained.__contains__)


def pretrain(config: emu.EmuConfig, ids: emu.SpecialIds, sources: tuple[SourceWeights, ...] = ()) -> Objective:
    """Classify the next text token or regress the next visual embedding; losses of several sources are told apart."""
    if config.llama.int8:
        raise UserError(
            "config.model.llama.int8=True: integers are not trained; pretrain float32 or bfloat16 parameters, or train "
            "adapters beside int8 ones with config.objective=instruct"
        )
    return _interleaved(config, ids, sources)


def _interleaved(config: emu.EmuConfig, ids: emu.SpecialIds, sources: tuple[SourceWeights, ...]) -> Objective:
    """The loss of interleaved documents, with every parameter trained."""
    adapters_drop = config.llama.lora_rank > 0 and config.llama.lora_dropout > 0
    random = config.causal.dropout > 0 or config.vision.drop_path > 0 or adapters_drop

    def loss(params: dict, statistics: dict, batch: emu.Batch, key: Array, normalisers: tuple) -> tuple:
        key = key if random else None
        return emu.loss(
            params, statistics, batch, config=config, ids=ids, key=key, normalisers=normalisers, sources=sources
        )

    kinds = ("text_loss", "regression_loss")
    return Objective(
        holds="emu",
        init=lambda key: (emu.init(config, key), emu.initial_statistics(config)),
        logical_axes=emu.logical_axes(config),
        shapes=emu.abstract(config),
        loss=loss,
        normalisers=lambda batch: emu.loss_weights(batch, len(sources)),
        summed=frozenset({"loss", *kinds, *(f"{kind}/{source.name}" for kind in kinds for source in sources)}),
        batch=emu.Batch,
    )


def instruct(config: emu.EmuConfig, ids: emu.SpecialIds, sources: tuple[SourceWeights, ...] = ()) -> Objective:
    """Low-rank adapters beside the language model's kernels; every other parameter stays as it is, as in the paper.

    The kernels may be int8 (`quantise.py`), as QLoRA has it: gradients pass through them, and none is of them.
    """
    if config.llama.lora_rank == 0:
        raise UserError("config.model.llama.lora_rank=0; the objective instruct trains adapters, expected 1 or more")
    return dataclasses.replace(_interleaved(config, ids, sources), trains=lora.is_adapter)


@dataclasses.dataclass(frozen=True)
class VAELossConfig:
    """`config.loss` of the objective vae: weights beside the absolute error's 1."""

    squared_weight: float = 1.0
    kl_weight: float = 1e-3

    def __post_init__(self):
        if min(self.squared_weight, self.kl_weight) < 0:
            raise UserError(f"config.loss: {self}; expected weights of 0 or more")


def train_vae(config: vae.VAEConfig, weights: VAELossConfig) -> Objective:
    """Reconstruct images through a noisy bottleneck (Kingma and Welling 2014): |error| + error² + KL.

    Batches: pixels uint8 [B, H, W, 3]. The statistics hold the latents' running mean square, from which the scale of
    a trained VAE follows.
    """
    keep = 0.99  # of the running mean, a step

    def loss(params: dict, statistics: dict, batch: dict, key: Array, count: Array) -> tuple:
        images = vae.normalise(batch["pixels"])  # [B, H, W, 3]
        mean, log_variance = vae.encode(params["vae"], images, config=config)  # [B, h, w, C]
        latents = mean + jnp.exp(0.5 * log_variance) * jax.random.normal(key, mean.shape)
        error = vae.decode(params["vae"], latents * config.scale, config=config) - images
        kl = 0.5 * (jnp.square(mean) + jnp.exp(log_variance) - 1.0 - log_variance)
        share = len(images) / count
        parts = {
            "absolute_error": share * jnp.abs(error).mean(),
            "squared_error": share * jnp.square(error).mean(),
            "kl": share * kl.mean(),
        }
        total = (
            parts["absolute_error"] + weights.squared_weight * parts["squared_error"] + weights.kl_weight * parts["kl"]
        )
        square = jax.lax.stop_gradient(jnp.square(mean).mean())
        statistics = statistics | {"latent_square": keep * statistics["latent_square"] + (1.0 - keep) * square}
        return total, (parts | {"loss": total}, statistics)

    return Objective(
        holds="vae",
        init=lambda key: ({"vae": vae.init(config, key)}, {"latent_square": jnp.ones(())}),
        logical_axes={"vae": vae.logical_axes(config)},
        shapes={"vae": vae.abstract(config)},
        loss=loss,
        normalisers=lambda batch: jnp.asarray(float(len(batch["pixels"]))),
        summed=frozenset({"loss", "absolute_error", "squared_error", "kl"}),
    )


@dataclasses.dataclass(frozen=True)
class DecoderLossConfig:
    """`config.loss` of the objective decoder.

    Attributes:
      condition_drop: share of examples whose condition is the unconditional embeddings (the paper: 10%).
      encoded_share: of examples conditioned on the image's own embeddings instead of those generated from its text;
        the paper uses generated ones alone (0).
      min_snr: gamma of min-SNR weighting; 0 weighs all timesteps alike, as published.
    """

    condition_drop: float = 0.1
    encoded_share: float = 0.0
    min_snr: float = 0.0

    def __post_init__(self):
        if not 0 <= self.condition_drop <= 1 or not 0 <= self.encoded_share <= 1 or self.min_snr < 0:
            raise UserError(f"config.loss: {self}; expected shares of 0 to 1 and min_snr of 0 or more")


def train_decoder(
    config: unet.UNetConfig, schedule: diffusion.Schedule, weights: DecoderLossConfig, unconditional: Array
) -> Objective:
    """Predict the noise in an image's latents from its embeddings, as the paper's decoder is trained.

    Batches: latents [B, h, w, C], condition and encoded [B, Q, D] (generated from the text; the image's own).
    unconditional [Q, D] takes their place where the condition is dropped.
    """

    def loss(params: dict, statistics: dict, batch: dict, key: Array, count: Array) -> tuple:
        keys = jax.random.split(key, 4)
        latents = batch["latents"]
        rows = (len(latents), 1, 1)
        condition = jnp.where(
            jax.random.bernoulli(keys[0], weights.encoded_share, rows), batch["encoded"], batch["condition"]
        )
        dropped = jax.random.bernoulli(keys[1], weights.condition_drop, rows)
        condition = jnp.where(dropped, unconditional, condition)  # [B, Q, D]
        timesteps = jax.random.randint(keys[2], rows[:1], 0, schedule.train_steps)
        noise = jax.random.normal(keys[3], latents.shape)
        noisy = diffusion.add_noise(schedule, latents, noise, timesteps)
        eps = unet.apply(params["unet"], noisy, timesteps, condition, config=config)
        error = jnp.square(eps - noise).mean((1, 2, 3))  # [B]
        total = (diffusion.loss_weights(schedule, timesteps, weights.min_snr) * error).sum() / count
        return total, ({"loss": total, "noise_error": error.sum() / count}, statistics)

    return Objective(
        holds="unet",
        init=lambda key: ({"unet": unet.init(config, key)}, {}),
        logical_axes={"unet": unet.logical_axes(config)},
        shapes={"unet": unet.abstract(config)},
        loss=loss,
        normalisers=lambda batch: jnp.asarray(float(len(batch["latents"]))),
        summed=frozenset({"loss", "noise_error"}),
    )
