"""The visual decoder, ready to draw: embeddings [N, Q, D] -> images uint8 [N, H, W, 3].

folder/unet, folder/vae    diffusers folders, converted ones, or work directories of the objectives decoder and vae
folder/scheduler           beside a diffusers U-Net; the others' configs hold the schedule
folder/safety_checker      optional
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from emu_jax.checkpoints.layout import SAFETY_CHECKER, SCHEDULER, UNET, VAE
from emu_jax.checkpoints.store import is_checkpoint, load_part
from emu_jax.errors import UserError
from emu_jax.generate.safety import SafetyCheck
from emu_jax.generate.samplers import make_table, sample
from emu_jax.models import unet, vae
from emu_jax.models.diffusion import Schedule


class Decoder:
    """U-Net, VAE, schedule, and a safety checker where there is one.

    `size` is the images' height and width where none is given, in pixels; `queries` the embeddings an image that the
    U-Net was trained on, where its files say so.
    """

    def __init__(
        self,
        unet_config: unet.UNetConfig,
        unet_params: unet.Params,
        vae_config: vae.VAEConfig,
        vae_params: vae.Params,
        schedule: Schedule,
        *,
        size: int,
        where: str,
        queries: int | None = None,
        safety: SafetyCheck | None = None,
    ):
        if unet_config.latent_channels != vae_config.latent_channels:
            raise UserError(
                f"{where}: the U-Net works on {unet_config.latent_channels} latent channels, the VAE on "
                f"{vae_config.latent_channels}; use the VAE that the U-Net was trained with"
            )
        self.unet_config, self.vae_config, self.schedule = unet_config, vae_config, schedule
        self.size, self.where, self.queries, self.safety = size, where, queries, safety
        self.unet_params, self.vae_params = (jax.tree.map(jnp.asarray, p) for p in (unet_params, vae_params))

    @staticmethod
    def exists(folder: Path) -> bool:
        """Whether a folder holds a visual decoder."""
        return (folder / UNET).is_dir() and (folder / VAE).is_dir()

    @classmethod
    def load(cls, folder: Path, *, safety_checker: bool = True, weights: str = "auto") -> Decoder:
        """Loads a folder with `unet` and `vae` in it, and its safety checker unless that is off or absent.

        Args:
          weights: of `checkpoint.WEIGHTS`, where the parts are runs.

        Raises:
          UserError: a part is missing, or the parts do not fit each other.
        """
        if not cls.exists(folder):
            raise UserError(f"{folder}: no visual decoder; expected the folders {UNET} and {VAE} in it")
        vae_config, vae_params, _ = load_vae(folder / VAE, weights)
        if is_checkpoint(folder / UNET):
            config, params, _ = load_part(folder / UNET, "decoder", weights)
            fields, unet_params = config.unet, params["unet"]
            schedule, latent_size = Schedule.from_dict(config.schedule), config.latent_size
            queries = config.queries or None
        else:
            from emu_jax.checkpoints.convert import diffusers

            fields, unet_params = diffusers.load_unet(folder / UNET)
            schedule, queries = diffusers.load_schedule(folder / SCHEDULER), None
            latent_size = diffusers.sample_size(folder / UNET)
        unet_config = unet.UNetConfig.from_dict(fields)
        size = latent_size * vae_config.reduction
        models = (unet_config, unet_params, vae_config, vae_params)
        checks = safety_checker and (folder / SAFETY_CHECKER).is_dir()
        safety_check = SafetyCheck.load(folder / SAFETY_CHECKER) if checks else None
        return cls(*models, schedule, size=size, where=str(folder), queries=queries, safety=safety_check)

    def check_condition(self, queries: int, width: int) -> None:
        """Raises UserError unless this decoder takes a model's embeddings [Q, D]."""
        if self.unet_config.condition_dim != width:
            raise UserError(
                f"{self.where}: the decoder's condition is {self.unet_config.condition_dim} wide, the model's "
                f"embeddings are {width}; load the decoder that was trained with this model"
            )
        if self.queries not in (None, queries):
            raise UserError(
                f"{self.where}: the decoder was trained on {self.queries} embeddings an image, the model has "
                f"{queries}; load the decoder that was trained with this model"
            )

    def check(self, sampler: str, steps: int, guidance: float, height: int, width: int) -> None:
        """Raises UserError for settings that cannot work; compiles nothing."""
        make_table(sampler, self.schedule, steps)
        if not np.isfinite(guidance):
            raise UserError(f"guidance={guidance}; expected a finite number, usually 1 to 10")
        multiple = self.vae_config.reduction
        for name, value in (("height", height), ("width", width)):
            if value < 1 or value % multiple:
                raise UserError(f"{name}={value}; expected a multiple of {multiple} pixels")

    def initial_latents(self, seeds: Sequence[int], height: int, width: int) -> jax.Array:
        """Standard normal latents [N, h, w, C], each from its own seed: an image does not depend on its neighbours."""
        reduction = self.vae_config.reduction
        shape = (height // reduction, width // reduction, self.unet_config.latent_channels)
        return _normals(jnp.asarray(seeds, jnp.uint32), shape)

    def draw(
        self,
        condition: np.ndarray,
        unconditional: np.ndarray,
        latents: np.ndarray | jax.Array,
        *,
        sampler: str,
        steps: int,
        guidance: float,
    ) -> tuple[np.ndarray, list[bool | None]]:
        """condition and unconditional [N, Q, D], latents [N, h, w, C] of variance 1 -> images uint8 [N, H, W, 3].

        And whether each was flagged, None where no checker looked at it. Flagged images are black, as published.
        """
        latents = sample(
            self.unet_params,
            make_table(sampler, self.schedule, steps),
            jnp.asarray(latents),
            jnp.asarray(condition),
            jnp.asarray(unconditional),
            guidance,
            config=self.unet_config,
        )
        return self.decode(latents)

    def decode(self, latents: jax.Array) -> tuple[np.ndarray, list[bool | None]]:
        """Latents [N, h, w, C] -> images uint8 [N, H, W, 3], and whether each was flagged, as `draw` returns them."""
        images = np.asarray(_images(self.vae_params, latents, config=self.vae_config))
        if self.safety is None:
            return images, [None] * len(images)
        flags: list[bool | None] = [*self.safety.flagged(list(images))]
        return np.where(np.array(flags)[:, None, None, None], np.uint8(0), images), flags


def load_vae(folder: Path, weights: str = "auto") -> tuple[vae.VAEConfig, vae.Params, int | None]:
    """A VAE's config, with its latents' scale, its parameters, and the images' size in training where that is known.

    `folder` is a diffusers folder, a work directory or a converted checkpoint.
    """
    if is_checkpoint(folder):
        config, params, statistics = load_part(folder, "vae", weights)
        fields = config.vae.to_dict()
        if statistics:
            fields["scale"] = float(statistics["latent_square"]) ** -0.5  # latents of variance 1
        return vae.VAEConfig.from_dict(fields), params["vae"], config.image_size or None

    from emu_jax.checkpoints.convert import diffusers

    fields, params = diffusers.load_vae(folder)
    return vae.VAEConfig.from_dict(fields), params, None


@functools.partial(jax.jit, static_argnames="shape")
def _normals(seeds: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.vmap(lambda seed: jax.random.normal(jax.random.key(seed), shape))(seeds)


@functools.partial(jax.jit, static_argnames="config")
def _images(params: vae.Params, latents: jax.Array, *, config: vae.VAEConfig) -> jax.Array:
    """Latents [N, h, w, C] -> uint8 [N, H, W, 3], a few at a time: full-size activations are the largest there are."""
    images = jax.lax.map(lambda z: vae.decode(params, z[None], config=config)[0], latents, batch_size=4)
    return jnp.round(255.0 * jnp.clip(images / 2 + 0.5, 0.0, 1.0)).astype(jnp.uint8)


@functools.partial(jax.jit, static_argnames="config")
def encode_latents(params: vae.Params, images: jax.Array, *, config: vae.VAEConfig) -> tuple[jax.Array, jax.Array]:
    """Images uint8 [N, H, W, 3] -> mean and standard deviation of their scaled latents, 2 x [N, h, w, C]."""
    mean, log_variance = vae.encode(params, vae.normalise(images), config=config)
    return mean * config.scale, jnp.exp(0.5 * log_variance) * config.scale
