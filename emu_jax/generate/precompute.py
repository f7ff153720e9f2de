"""Precomputes the visual decoder's training examples: documents, a frozen model and a VAE -> `data/latents.py`.

For every image with content before it: the embeddings that the model generates from that content (the condition of the
U-Net when it draws), the image's own embeddings, and its latents.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
from tqdm import tqdm

from emu_jax.checkpoints.load import LoadedVAE, load_part
from emu_jax.checkpoints.shipped import model_path
from emu_jax.checkpoints.store import weights_of_parts
from emu_jax.data.document import Image, Text
from emu_jax.data.images import resize
from emu_jax.data.latents import INDEX, LatentExample, write_latents
from emu_jax.data.padding import padded_batches
from emu_jax.data.sources import PairOrder, Source, open_source
from emu_jax.errors import UserError
from emu_jax.generate.decoder import encode_latents
from emu_jax.generate.model import Emu
from emu_jax.storage import Path

BATCH = 32
TOGETHER = 256  # records that are read at the same time
TEXT_LIMIT = 150  # characters; images after longer texts are dropped (from one set of notes on the paper)


def precompute(
    model: Path,
    vae: Path,
    out: Path,
    *,
    source: str,
    split: str,
    image_size: int | None = None,
    tokenizer: Path | None = None,
    vision_head_dim: int | None = None,
    weights: str = "auto",
) -> int:
    """Writes `out`; returns the number of examples.

    Args:
      model, tokenizer, vision_head_dim, weights: as in `Emu.load`.
      vae: a work directory, a checkpoint, a diffusers folder, or "emu-mini/vae".
      source, split: as in `config.data` of pretraining.
      image_size: height and width in pixels of the images to draw; by default the VAE's size in training, or 512 if it
        is not known.

    Raises:
      UserError: `out` exists already, or no image of the source has a short text before it.
    """
    if (out / INDEX).exists():
        raise UserError(f"out={out}: the folder holds precomputed examples; name another folder, or remove it")
    emu = Emu.load(model, tokenizer=tokenizer, vision_head_dim=vision_head_dim, weights=weights)
    autoencoder = load_part(model_path(vae), LoadedVAE, weights_of_parts(weights))
    size = image_size or autoencoder.image_size or 512
    if size % autoencoder.config.reduction:
        raise UserError(f"image_size={size}; this VAE needs a multiple of {autoencoder.config.reduction}")
    records = open_source(source, split, size, PairOrder("text_first"))
    found = _conditioned_images(records)
    first = next(found, None)
    if first is None:
        raise UserError(f"source={source}: no image has a text of at most {TEXT_LIMIT} characters before it")
    pairs = itertools.chain([first], found)

    def examples() -> Iterator[LatentExample]:
        for batch, filled in tqdm(padded_batches(pairs, BATCH), desc="precompute", unit="batch"):
            images = np.stack([image.pixels for _, image in filled])
            seen = np.stack([resize(image, emu.config.vision.image_size) for image in images])
            encoded = emu.encode_images(seen)
            condition = emu.generate_embeddings([prompt for prompt, _ in filled])
            mean, deviation = encode_latents(autoencoder.params, images, config=autoencoder.config)
            for i, (_, image) in enumerate(batch):
                yield LatentExample(image.key, np.asarray(mean[i]), np.asarray(deviation[i]), condition[i], encoded[i])

    about = {
        "model": str(model),
        "vae": str(vae),
        "source": source,
        "split": split,
        "image_size": size,
        "weights": weights,
    }
    return write_latents(out, examples(), emu.unconditional[0], about)


def _conditioned_images(source: Source) -> Iterator[tuple[list[str | np.ndarray], Image]]:
    """Yields (everything before the image in its document, image) for every image that has something before it."""
    for start in range(0, len(source), TOGETHER):
        indices = range(start, min(start + TOGETHER, len(source)))
        for index, record in zip(indices, source.read(indices), strict=True):
            for document in source.documents(record, np.random.default_rng(index)):
                for place, part in enumerate(document.parts):
                    before = document.parts[:place]
                    texts = sum(len(piece.text) for piece in before if isinstance(piece, Text))
                    if isinstance(part, Image) and before and texts <= TEXT_LIMIT:
                        yield [piece.text if isinstance(piece, Text) else piece.pixels for piece in before], part
