"""Through the decoder: the language model's embeddings also receive the diffusion loss of the image that they draw.

    hidden states ─ visual head ─ predicted embeddings [Q, D] ─ condition of the U-Net ─ noise of the image's latents
                                                              gradient ◀──────────────── squared error

The published way trains Emu first and its U-Net afterwards, on what Emu generates. Here both losses are in one step, as
in DreamLLM (Dong et al. 2023, arXiv 2309.11499) and GILL (Koh et al. 2023, arXiv 2305.17216): the embeddings learn what
the decoder needs. With `model.regression_loss_weight=0` that is all that they learn, and with the visual head `queries`
they are learnt queries, as in these papers. The VAE is frozen, and with `optimizer.learning_rate.unet=0` the U-Net is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float
from ml_collections import ConfigDict

from emu_jax.checkpoints.load import LoadedVAE, load_part
from emu_jax.checkpoints.shipped import model_path
from emu_jax.errors import UserError, check_fields
from emu_jax.models import diffusion, emu, unet, vae
from emu_jax.models.flops import unet_forward_flops
from emu_jax.models.layers import Array
from emu_jax.train.tasks.interleaved import LOSSES, PackedInputs
from emu_jax.train.tasks.pretrain import Pretrain
from emu_jax.train.tasks.task import InitPart, OwnRows, fill_sizes


@dataclasses.dataclass(frozen=True)
class DrawingLossConfig:
    """`config.drawing_loss` of the objective end_to_end.

    Attributes:
      weight: weight of the diffusion loss, beside the text loss's.
      images: predicted images of a row that receive it, its first ones; 0 means all.
      min_snr: gamma of min-SNR weighting; 0 weighs all timesteps alike.
    """

    weight: float = 1.0
    images: int = 0
    min_snr: float = 0.0

    def __post_init__(self):
        for name in ("weight", "images", "min_snr"):
            if not getattr(self, name) >= 0:
                raise UserError(f"config.drawing_loss.{name}={getattr(self, name)}; expected 0 or more")


class EndToEnd(Pretrain):
    """Pretrains Emu, and trains its visual decoder's U-Net or learns through a frozen one.

    The U-Net (`config.unet`) begins from `config.init.unet`, or fresh; `config.init.vae` must name a VAE, whose sizes
    become `config.vae`. Images are drawn in the size that the vision encoder reads.
    """

    init_parts: ClassVar[Mapping[str, InitPart]] = {
        **Pretrain.init_parts,
        "unet": InitPart(("unet",), ("unet", "emu"), "params/unet/.*"),
        "vae": InitPart((), ("vae", "emu"), "params/vae/.*"),
    }
    plots: ClassVar[Mapping[str, tuple[str, ...]]] = {**Pretrain.plots, "losses": (*LOSSES, "noise_error")}

    def __init__(self, config: ConfigDict, inputs: PackedInputs | None = None):
        check_fields(DrawingLossConfig, "config.drawing_loss", config.drawing_loss)
        self.drawing = DrawingLossConfig(**config.drawing_loss)
        self.unet = unet.UNetConfig.from_dict(config.unet)
        self.vae = vae.VAEConfig.from_dict(config.vae)
        self.schedule = diffusion.Schedule.from_dict(config.schedule)
        super().__init__(config, inputs)
        self._random = True

    def check_model(self, model: emu.EmuConfig) -> None:
        super().check_model(model)
        if not model.visual_head.differentiable:
            raise UserError(
                f"config.model.visual_head.name={model.visual_head.name}: its samples have no gradient, which the "
                "decoder's loss needs; use a regression head, or queries"
            )
        if model.vision.image_size % self.vae.reduction:
            raise UserError(
                f"config.model.vision.image_size={model.vision.image_size}; this VAE needs a multiple of "
                f"{self.vae.reduction}"
            )

    @classmethod
    def open(cls, config: ConfigDict, own: OwnRows) -> PackedInputs:
        return super().open(_with_sizes(config), own)

    @classmethod
    def resolve_without_data(cls, config: ConfigDict, rows: int = 0) -> ConfigDict:
        return super().resolve_without_data(_with_sizes(config), rows)

    def declare(self) -> tuple[dict[str, Any], dict[str, Any]]:
        axes, shapes = super().declare()
        axes |= {"unet": unet.logical_axes(self.unet), "vae": vae.logical_axes(self.vae)}
        return axes, shapes | {"unet": unet.abstract(self.unet), "vae": vae.abstract(self.vae)}

    def may_train(self, path: str) -> bool:
        return not path.startswith("vae/") and super().may_train(path)

    def init(self, key: Array) -> tuple[dict, dict]:
        params, statistics = super().init(key)
        keys = jax.random.split(jax.random.fold_in(key, 1))
        params |= {"unet": unet.init(self.unet, keys[0]), "vae": vae.init(self.vae, keys[1])}
        return params, statistics

    @property
    def summed(self) -> frozenset[str]:
        return super().summed | {"noise_error"}

    # ---- a step ------------------------------------------------------------------------------------------------------

    def normalisers(self, batch: emu.Batch) -> tuple:
        """The two losses', and last the number of images that are drawn."""
        predicted = _predicted(batch).sum(1)  # [B]
        drawn = jnp.minimum(predicted, self.drawing.images) if self.drawing.images else predicted
        return *super().normalisers(batch), drawn.sum().astype(jnp.float32)

    def further(self, params: dict, batch: emu.Batch, key: Array, normalisers: tuple) -> emu.Further:
        def noise_error(model: emu.EmuModel, hidden: Array) -> tuple[Array, dict[str, Array]]:
            condition, here = emu.predicted_images(model, hidden, batch, self.ids)  # [B, I, Q, D], [B, I]
            images = batch.images
            if self.drawing.images:
                first = jnp.argsort(~here, axis=1, stable=True)[:, : self.drawing.images]  # [B, N]
                condition, images = (
                    jnp.take_along_axis(x, first.reshape(*first.shape, *(1,) * (x.ndim - 2)), axis=1)
                    for x in (condition, images)
                )
                here = jnp.take_along_axis(here, first, axis=1)
            condition, images, here = (x.reshape(-1, *x.shape[2:]) for x in (condition, images, here))
            weighted, error = self._noise_error(params, condition, images, here, jax.random.fold_in(key, 6))
            count = jnp.maximum(normalisers[-1], 1.0)
            return self.drawing.weight * weighted / count, {"noise_error": error / count}

        return noise_error

    def _noise_error(
        self,
        params: dict,
        condition: Float[Array, "N Q D"],
        images: Array,
        here: Bool[Array, " N"],
        key: Array,
    ) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """Sums over the images that are `here`: the squared error of the noise, weighted by min-SNR and not."""
        keys = jax.random.split(key, 3)
        frozen = jax.lax.stop_gradient(params["vae"])
        mean, log_variance = vae.encode(frozen, vae.normalise(images), config=self.vae)  # [N, h, w, C]
        deviation = jnp.exp(0.5 * log_variance)
        latents = (mean + deviation * jax.random.normal(keys[0], mean.shape)) * self.vae.scale
        latents = jax.lax.stop_gradient(latents)
        timesteps = jax.random.randint(keys[1], here.shape, 0, self.schedule.train_steps)
        noise = jax.random.normal(keys[2], latents.shape)
        noisy = diffusion.add_noise(self.schedule, latents, noise, timesteps)
        eps = unet.apply(params["unet"], noisy, timesteps, condition.astype(jnp.float32), config=self.unet)
        error = jnp.where(here, jnp.square(eps - noise).mean((1, 2, 3)), 0.0)  # [N]
        return (diffusion.loss_weights(self.schedule, timesteps, self.drawing.min_snr) * error).sum(), error.sum()

    def flops(self) -> dict[str, float]:
        """Emu's and the U-Net's; the VAE's encoder is not counted."""
        data = self.config.data
        images = self.rows * (self.drawing.images or data.row_images)
        side = self.model.vision.image_size // self.vae.reduction
        forward = unet_forward_flops(self.unet, images, side, self.model.causal.queries)
        trained = any(path.startswith("unet/") for path in self.trainable)
        found = super().flops()
        for part, count in forward.items():
            found[part] = found.get(part, 0.0) + (2.0 + trained) * count
        return found


def _predicted(batch: emu.Batch) -> Bool[Array, "B I"]:
    """Which slots' images are predicted."""
    slots = jnp.where((batch.slots >= 0) & (batch.visual_weights > 0), batch.slots, -1)  # [B, S]
    return (slots[..., None] == jnp.arange(batch.images.shape[1])).any(1)


def _with_sizes(config: ConfigDict) -> ConfigDict:
    """A copy of the config with the sizes of the VAE, and those of the U-Net that follow from the model's."""
    if not (config.get("init", None) or {}).get("vae", ""):
        raise UserError(
            "config.init.vae is empty: the latents that the U-Net draws need a VAE; name the work directory of "
            "configs/vae.py, or emu-mini/vae"
        )
    config = config.copy_and_resolve_references()
    found = load_part(model_path(config.init.vae), LoadedVAE).config
    config.vae = ConfigDict(dataclasses.asdict(found))
    config.latent_size = config.model.vision.image_size // found.reduction
    config.queries = config.model.causal.queries
    sizes = {"unet.latent_channels": found.latent_channels, "unet.condition_dim": config.model.llama.width}
    return fill_sizes(config, sizes, "the VAE and the model have")
