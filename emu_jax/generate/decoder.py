"""The visual decoder: embeddings [N, Q, D] -> images uint8 [N, H, W, 3].

folder/unet, folder/vae    work directories, checkpoints, or diffusers folders; or all in one checkpoint, as
                           those of the objective end_to_end are
folder/scheduler           beside a diffusers U-Net; checkpoints hold the schedule in their config
folder/safety_checker      optional, a diffusers folder
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from PIL.Image import Image as PILImage

from emu_jax.checkpoints.layout import SAFETY_CHECKER, UNET, VAE
from emu_jax.checkpoints.load import LoadedSafetyChecker, LoadedUNet, LoadedVAE, has_decoder, load_part
from emu_jax.errors import UserError
from emu_jax.generate.safety import SafetyCheck
from emu_jax.generate.samplers import make_table, sample
from emu_jax.models import vae
from emu_jax.storage import Path


@dataclasses.dataclass(frozen=True)
class GeneratedImage:
    """A drawn image.

    Attributes:
      embeddings: visual embeddings that the image was drawn from.
      seed: seed of the initial noise.
      flagged: whether the safety checker flagged the image, which is then black; None without a checker.
    """

    image: PILImage
    embeddings: Float[np.ndarray, "Q D"]
    seed: int
    flagged: bool | None = None


SEEDS = 2**32  # seeds are 0 to SEEDS - 1


def consecutive_seed(first: int, number: int) -> int:
    """The seed of image `number` of several whose first seed is given; the one after the highest is 0.

    A first seed out of range stays as it is, for `check_seeds` to refuse.

    >>> consecutive_seed(5, 2), consecutive_seed(4294967295, 1), consecutive_seed(-1, 2)
    (7, 0, -1)
    """
    return (first + number) % SEEDS if 0 <= first < SEEDS else first


def check_seeds(seeds: Sequence[int], count: int) -> None:
    """Raises UserError unless there is one seed for each of `count` prompts, and all are in range."""
    if len(seeds) != count or min(seeds) < 0 or max(seeds) >= SEEDS:
        raise UserError(f"seeds={list(seeds)}; expected {count} of them, one a prompt, each 0 to {SEEDS - 1}")


@dataclasses.dataclass(frozen=True)
class Drawing:
    """How images are drawn; see `Emu.generate_images`."""

    sampler: str = "pndm"
    steps: int = 50
    guidance: float = 7.5
    height: int | None = None
    width: int | None = None


class Decoder:
    """U-Net, VAE, noise schedule, and optionally a safety checker.

    Args:
      where: the folder, for errors.

    Attributes:
      size: default height and width of images in pixels.
      queries: embeddings per image that the U-Net was trained on, if that is known.
    """

    def __init__(self, unet: LoadedUNet, vae: LoadedVAE, *, where: str, safety: SafetyCheck | None = None):
        if unet.config.latent_channels != vae.config.latent_channels:
            raise UserError(
                f"{where}: the U-Net works on {unet.config.latent_channels} latent channels, the VAE on "
                f"{vae.config.latent_channels}; use the VAE that the U-Net was trained with"
            )
        self.unet_config, self.unet_params, self.schedule = unet.config, unet.params, unet.schedule
        self.vae_config, self.vae_params = vae.config, vae.params
        self.size, self.queries = unet.latent_size * vae.config.reduction, unet.queries
        self.where, self.safety = where, safety

    @staticmethod
    def exists(folder: Path) -> bool:
        """Whether a folder holds a visual decoder."""
        return ((folder / UNET).is_dir() and (folder / VAE).is_dir()) or has_decoder(folder)

    @classmethod
    def load(cls, folder: Path, *, safety_checker: bool = True, weights: str = "auto") -> Decoder:
        """Loads a folder with `unet` and `vae` in it, and its safety checker if it has one.

        Args:
          safety_checker: whether to load the safety checker.
          weights: "auto", "raw" or "ema", for parts that were trained here.

        Raises:
          UserError: a part is missing, or the parts do not fit together.
        """
        if not cls.exists(folder):
            raise UserError(f"{folder}: no visual decoder; expected the folders {UNET} and {VAE} in it")
        parts = (folder, folder) if has_decoder(folder) else (folder / VAE, folder / UNET)
        vae, unet = load_part(parts[0], LoadedVAE, weights), load_part(parts[1], LoadedUNet, weights)
        safety = None
        if safety_checker and (folder / SAFETY_CHECKER).is_dir():
            safety = SafetyCheck(load_part(folder / SAFETY_CHECKER, LoadedSafetyChecker))
        return cls(unet, vae, where=str(folder), safety=safety)

    def check_condition(self, queries: int, width: int) -> None:
        """Raises UserError unless this decoder takes a model's embeddings [Q, D]."""
        if self.unet_config.condition_dim != width:
            raise UserError(
                f"{self.where}: the decoder's condition is {self.unet_config.condition_dim} wide, the model's "
                f"embeddings are {width}; load the decoder that was trained with this model"
            )
        if self.queries not in (None, queries):
            raise UserError(
                f"{self.where}: the decoder was trained on {self.queries} embeddings per image, the model has "
                f"{queries}; load the decoder that was trained with this model"
            )

    def check(self, drawing: Drawing) -> None:
        """Raises UserError for settings that cannot work, before anything is compiled."""
        make_table(drawing.sampler, self.schedule, drawing.steps)
        if not np.isfinite(drawing.guidance):
            raise UserError(f"guidance={drawing.guidance}; expected a finite number, usually 1 to 10")
        multiple = self.vae_config.reduction
        for name, value in (("height", drawing.height), ("width", drawing.width)):
            if value and (value < 1 or value % multiple):
                raise UserError(f"{name}={value}; expected a multiple of {multiple} pixels")

    def initial_latents(self, seeds: Sequence[int], height: int | None = None, width: int | None = None) -> jax.Array:
        """Standard normal latents [N, h, w, C], each from its own seed, so that images do not depend on the batch."""
        sides = ((side or self.size) // self.vae_config.reduction for side in (height, width))
        return _normals(jnp.asarray(seeds, jnp.uint32), (*sides, self.unet_config.latent_channels))

    def draw(
        self,
        condition: np.ndarray,
        unconditional: np.ndarray,
        latents: np.ndarray | jax.Array,
        drawing: Drawing,
    ) -> tuple[np.ndarray, list[bool | None]]:
        """Denoises latents and decodes them: images uint8 [N, H, W, 3], and whether each was flagged.

        Flags are None without a safety checker. Flagged images are black, as in the published code.

        Args:
          condition, unconditional: [N, Q, D].
          latents: [N, h, w, C], of variance 1, in place of the drawing's height and width.
        """
        latents = sample(
            self.unet_params,
            make_table(drawing.sampler, self.schedule, drawing.steps),
            jnp.asarray(latents),
            jnp.asarray(condition),
            jnp.asarray(unconditional),
            drawing.guidance,
            config=self.unet_config,
        )
        return self.decode(latents)

    def round_trip(self, images: np.ndarray) -> np.ndarray:
        """Images uint8 [N, H, W, 3] -> what the VAE makes of them, without the U-Net."""
        mean, _ = encode_latents(self.vae_params, images, config=self.vae_config)
        return np.asarray(_images(self.vae_params, mean, config=self.vae_config))

    def decode(self, latents: jax.Array) -> tuple[np.ndarray, list[bool | None]]:
        """Latents [N, h, w, C] -> images uint8 [N, H, W, 3] and flags, as in `draw`."""
        images = np.asarray(_images(self.vae_params, latents, config=self.vae_config))
        if self.safety is None:
            return images, [None] * len(images)
        flags: list[bool | None] = [*self.safety.flagged(list(images))]
        return np.where(np.array(flags)[:, None, None, None], np.uint8(0), images), flags


@functools.partial(jax.jit, static_argnames="shape")
def _normals(seeds: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.vmap(lambda seed: jax.random.normal(jax.random.key(seed), shape))(seeds)


@functools.partial(jax.jit, static_argnames="config")
def _images(params: vae.Params, latents: jax.Array, *, config: vae.VAEConfig) -> jax.Array:
    """Latents [N, h, w, C] -> uint8 [N, H, W, 3], a few at a time, because full-size activations are large."""
    images = jax.lax.map(lambda z: vae.decode(params, z[None], config=config)[0], latents, batch_size=4)
    return jnp.round(255.0 * jnp.clip(images / 2 + 0.5, 0.0, 1.0)).astype(jnp.uint8)


@functools.partial(jax.jit, static_argnames="config")
def encode_latents(params: vae.Params, images: jax.Array, *, config: vae.VAEConfig) -> tuple[jax.Array, jax.Array]:
    """Images uint8 [N, H, W, 3] -> mean and standard deviation of their scaled latents, each [N, h, w, C]."""
    mean, log_variance = vae.encode(params, vae.normalise(images), config=config)
    return mean * config.scale, jnp.exp(0.5 * log_variance) * config.scale
