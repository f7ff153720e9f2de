"""What the visual decoder is trained on, from documents: a frozen model and a VAE -> `latents.LatentExample`.

For an image with content before it: the embeddings that the model generates from that content (the condition of the
U-Net when it draws), the image's own embeddings, and its latents. `precompute.py` writes them to files, `online.py`
makes them while the decoder trains.
"""

from __future__ import annotations

import dataclasses
import hashlib
import threading
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from emu_jax.checkpoints.load import LoadedVAE, load_part
from emu_jax.checkpoints.shipped import model_path
from emu_jax.checkpoints.store import weights_of_parts
from emu_jax.data.document import Image, Text
from emu_jax.data.images import EncodedImage, ImageFile, resize
from emu_jax.data.latents import LatentExample
from emu_jax.data.padding import pad_to
from emu_jax.data.sources import PairOrder, Source, open_source
from emu_jax.errors import UserError
from emu_jax.generate.decoder import encode_latents
from emu_jax.generate.model import Emu
from emu_jax.models.paths import flatten
from emu_jax.storage import Path

TEXT_LIMIT = 150  # characters; images after longer texts are dropped (from one set of notes on the paper)


@dataclasses.dataclass(frozen=True)
class ToDraw:
    """An image that the decoder is to learn to draw; `prompt` is everything before it in its document."""

    prompt: tuple[Text | Image, ...]
    image: Image

    def read(self) -> tuple[list[str | np.ndarray], np.ndarray]:
        """The prompt as the model takes it, and the image's pixels.

        Raises:
          ImageError: an image cannot be read.
        """
        prompt = [part.text if isinstance(part, Text) else part.pixels for part in self.prompt]
        return prompt, self.image.pixels

    def has_side(self, pixels: int) -> bool:
        """Whether the image's shorter side has so many pixels where it is stored.

        Raises:
          ImageError: it cannot be read.
        """
        content = self.image.content
        if not pixels:
            return True
        if isinstance(content, EncodedImage | ImageFile):
            return min(content.stored_shape()) >= pixels
        return min(self.image.pixels.shape[:2]) >= pixels


def open_images(source: str, split: str, size: int, fit: str, max_faults: float = 0.0) -> Source:
    """A source whose images are `size` pixels a side, and whose pairs have the text first."""
    return open_source(source, split, size, PairOrder("text_first"), fit=fit, max_faults=max_faults)


def images_to_draw(source: Source, record: Any, rng: np.random.Generator) -> Iterator[ToDraw]:
    """The images of a record that have something before them, but not a text that is too long."""
    for document in source.documents(record, rng):
        for place, part in enumerate(document.parts):
            before = document.parts[:place]
            texts = sum(len(piece.text) for piece in before if isinstance(piece, Text))
            if isinstance(part, Image) and before and texts <= TEXT_LIMIT:
                yield ToDraw(before, part)


class Conditions:
    """The model and the VAE.

    Args:
      model, tokenizer, vision_head_dim, weights: as in `Emu.load`.
      vae: a work directory, a checkpoint, a diffusers folder, or "emu-mini/vae".
      image_size: height and width in pixels of the images to draw; by default the VAE's size in training, or 512 if it
        is not known.
      generated: whether embeddings are generated from what is before the images; without, the images' own ones are in
        their place.
      encoded: whether the images' own embeddings are made, too.

    Attributes:
      size: height and width in pixels of the images to draw.
      unconditional: [Q, D], embeddings for the empty prompt.
      fingerprint: identifies the model and the VAE's parameters.

    Raises:
      UserError: the VAE cannot encode images of that size.
    """

    def __init__(
        self,
        model: Path,
        vae: Path,
        *,
        image_size: int | None = None,
        generated: bool = True,
        encoded: bool = True,
        tokenizer: Path | None = None,
        vision_head_dim: int | None = None,
        weights: str = "auto",
    ):
        self._emu = Emu.load(model, tokenizer=tokenizer, vision_head_dim=vision_head_dim, weights=weights)
        self._vae = load_part(model_path(vae), LoadedVAE, weights_of_parts(weights))
        self._generated, self._encoded = generated, encoded
        self._one_at_a_time = threading.Lock()  # a pipeline reads ahead in threads, and two batches might not fit
        self.size = image_size or self._vae.image_size or 512
        if self.size % self._vae.config.reduction:
            raise UserError(f"image_size={self.size}; this VAE needs a multiple of {self._vae.config.reduction}")
        self.unconditional = self._emu.unconditional[0]
        digest = hashlib.sha256(self._emu.fingerprint.encode())
        for name, leaf in sorted(flatten(self._vae.params).items()):
            digest.update(name.encode() + np.asarray(leaf).tobytes())
        self.fingerprint = digest.hexdigest()

    def examples(self, found: Sequence[ToDraw], batch: int) -> list[LatentExample]:
        """The examples of at most `batch` images; the programs are compiled for a batch of that size.

        Raises:
          ImageError: an image cannot be read.
        """
        return self.of_pixels([one.read() for one in found], [one.image.key for one in found], batch)

    def of_pixels(
        self, pairs: Sequence[tuple[list[str | np.ndarray], np.ndarray]], keys: Sequence[str], batch: int
    ) -> list[LatentExample]:
        """The examples of prompts and the pixels of images, which `ToDraw.read` gives.

        The key of an image seeds its condition, which some visual heads draw at random.
        """
        with self._one_at_a_time:
            return self._of_pixels(pairs, keys, batch)

    def _of_pixels(
        self, pairs: Sequence[tuple[list[str | np.ndarray], np.ndarray]], keys: Sequence[str], batch: int
    ) -> list[LatentExample]:
        filled = pad_to(list(pairs), batch)
        images = np.stack([pixels for _, pixels in filled])
        mean, deviation = encode_latents(self._vae.params, images, config=self._vae.config)  # [batch, h, w, C] each
        own: Sequence[np.ndarray] = ()
        if self._encoded or not self._generated:
            seen = [resize(pixels, self._emu.config.vision.image_size) for pixels in images]
            own = list(self._emu.encode_images(np.stack(seen)))  # of [Q, D]
        condition = own
        if self._generated:
            prompts, seeds = [prompt for prompt, _ in filled], [zlib.crc32(key.encode()) for key in keys]
            seeds += [0] * (batch - len(seeds))
            condition = list(self._emu.generate_embeddings(prompts, seeds=seeds))  # of [Q, D]
        encoded: Sequence[np.ndarray | None] = own if self._encoded else [None] * batch
        mean, deviation = np.asarray(mean), np.asarray(deviation)
        return [LatentExample(key, mean[i], deviation[i], condition[i], encoded[i]) for i, key in enumerate(keys)]
