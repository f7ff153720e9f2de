"""Precomputes the visual decoder's training examples (`conditions.py`): documents -> a folder of `data/latents.py`."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
from tqdm import tqdm

from emu_jax.data.images import FITS, ImageError
from emu_jax.data.latents import DTYPES, LatentExample, LatentsFolder
from emu_jax.data.sources import Prepared, Source
from emu_jax.errors import UserError
from emu_jax.generate.conditions import TEXT_LIMIT, Conditions, ToDraw, images_to_draw, open_images
from emu_jax.storage import Path

BATCH = 32
CHUNK = 256  # records; they are read together, and their examples are one file


@dataclasses.dataclass(frozen=True)
class PrecomputeConfig:
    """What is precomputed, of which images.

    Attributes:
      source, split: as in `config.data` of pretraining.
      image_size: height and width in pixels of the images to draw; 0: the VAE's size in training, or 512 if it is not
        known.
      fit: how they become square, one of `images.FITS`.
      min_side: images whose shorter side has fewer pixels are left out.
      dtype: as which arrays are stored, a name in `latents.DTYPES`.
      encoded: whether the images' own embeddings are stored, which `config.loss.encoded_share` above 0 reads.
      max_faults: share of a chunk's images that may be unreadable.
    """

    source: str = "fluent_emoji"
    split: str = "train"
    image_size: int = 0
    fit: str = "crop"
    min_side: int = 0
    dtype: str = "float32"
    encoded: bool = True
    max_faults: float = 0.0

    def __post_init__(self):
        for name, known in (("fit", FITS), ("dtype", DTYPES)):
            if getattr(self, name) not in known:
                raise UserError(f"{name}={getattr(self, name)}: unknown; choose one of {', '.join(known)}")
        if self.image_size < 0 or self.min_side < 0 or not 0 <= self.max_faults <= 1:
            raise UserError(
                f"{self}; expected image_size and min_side of at least 0, and a share of 0 to 1 for max_faults"
            )


def precompute(
    model: Path,
    vae: Path,
    out: Path,
    config: PrecomputeConfig,
    *,
    part: tuple[int, int] = (0, 1),
    tokenizer: Path | None = None,
    vision_head_dim: int | None = None,
    weights: str = "auto",
) -> int | None:
    """Writes one part of `out`, or what is missing of it; returns the number of examples once `out` is complete.

    Args:
      model, vae, tokenizer, vision_head_dim, weights: as in `Conditions`.
      part: I and N: every N-th chunk of the source's records, from chunk I on. Parts may run at the same time, on any
        machines; the one that ends last completes `out`.

    Raises:
      UserError: `out` holds examples of other settings, no image can be an example, or too many cannot be read.
    """
    conditions = Conditions(
        model,
        vae,
        image_size=config.image_size or None,
        encoded=config.encoded,
        tokenizer=tokenizer,
        vision_head_dim=vision_head_dim,
        weights=weights,
    )
    source = open_images(config.source, config.split, conditions.size, config.fit, config.max_faults)
    if source.remark:
        print(source.remark, file=sys.stderr)
    if isinstance(source, Prepared) and source.squashed and config.fit != "squash":
        print(
            f"source={config.source}: `emu-jax prepare` has squashed its images, and fit={config.fit} changes them no "
            f"more; prepare it with --fit {config.fit}",
            file=sys.stderr,
        )
    settings: dict[str, Any] = {name: getattr(config, name) for name in ("fit", "min_side", "encoded")}
    settings |= {"image_size": conditions.size, "records": f"{source.fingerprint} {source.images_fingerprint}"}
    settings |= {"made_by": conditions.fingerprint}
    about = {"model": str(model), "vae": str(vae), "weights": weights, "source": config.source, "split": config.split}
    folder = LatentsFolder(out, -(-len(source) // CHUNK), config.dtype, settings, about)
    for number in tqdm(folder.missing(part), desc="precompute", unit="chunk"):
        chunk = _Chunk(source, range(number * CHUNK, min((number + 1) * CHUNK, len(source))), config)
        folder.write(number, chunk.examples(conditions))
        for line in chunk.remarks(number):
            print(line, file=sys.stderr)
    return folder.finish(conditions.unconditional)


class _Chunk:
    """The examples of some records."""

    def __init__(self, source: Source, indices: range, config: PrecomputeConfig):
        self._source, self._indices, self._config = source, indices, config
        self._faults: list[ImageError] = []
        self._read = 0

    def _readable(self) -> Iterator[tuple[ToDraw, tuple[list[str | np.ndarray], np.ndarray]]]:
        for index, record in zip(self._indices, self._source.read(self._indices), strict=True):
            for one in images_to_draw(self._source, record, np.random.default_rng(index)):
                try:
                    if not one.has_side(self._config.min_side):
                        continue
                    read = one.read()
                except ImageError as error:
                    if not self._config.max_faults:
                        raise
                    self._faults.append(error)
                else:
                    yield one, read
                self._read += 1

    def examples(self, conditions: Conditions) -> Iterator[LatentExample]:
        left = self._readable()
        while batch := list(itertools.islice(left, BATCH)):
            pairs, keys = [pair for _, pair in batch], [one.image.key for one, _ in batch]
            yield from conditions.of_pixels(pairs, keys, BATCH)
        if len(self._faults) > self._config.max_faults * self._read:
            raise UserError(
                f"source={self._config.source}: {len(self._faults)} of {self._read} images of records "
                f"{self._indices[0]} to {self._indices[-1]} cannot be read, more than max_faults="
                f"{self._config.max_faults:g}; the first: {self._faults[0]}"
            )

    def remarks(self, number: int) -> list[str]:
        """What the user should know of this chunk."""
        if not self._read:
            yes = f"has a text of at most {TEXT_LIMIT} characters before it"
            yes += f", and {self._config.min_side} pixels a side" * bool(self._config.min_side)
            return [f"chunk {number}: no image of records {self._indices[0]} to {self._indices[-1]} {yes}"]
        first = f"; the first: {self._faults[0]}" if self._faults else ""
        return [f"chunk {number}: {len(self._faults)} of {self._read} images left out{first}"] if self._faults else []
