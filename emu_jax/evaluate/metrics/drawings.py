"""Drawn images: distances from real ones, and how well they fit their texts.

Distances over the model's own features, and over VGG's where its weights are installed, are always computed; FID and
the CLIP score need weights that the user gives.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from emu_jax.checkpoints.vgg import find_weights, load
from emu_jax.data.clip_scores import ClipScorer, load_scorer
from emu_jax.data.images import load_image
from emu_jax.errors import UserError
from emu_jax.evaluate import intervals
from emu_jax.evaluate.intervals import Figure
from emu_jax.evaluate.metrics import frechet, inception
from emu_jax.generate.model import Emu
from emu_jax.storage import Path


def figures(
    emu: Emu,
    drawn: Sequence[Path],
    real: Sequence[Path],
    texts: Sequence[str],
    *,
    inception_weights: pathlib.Path | None = None,
    clip: pathlib.Path | None = None,
) -> dict[str, Figure]:
    """Fréchet distances and CLIP score.

    Args:
      drawn: files of drawn images; `texts` are what they were drawn from.
      real: files of the images to compare with.
      inception_weights: file of FID's Inception.
      clip: folder of a CLIP.
    """

    def images(paths: Sequence[Path]) -> Iterator[np.ndarray]:
        return (load_image(path) for path in paths)

    found = {
        "Frechet distance, own features": frechet.figure(
            frechet.encoder_features(emu, images(drawn)), frechet.encoder_features(emu, images(real))
        )
    }
    if (file := find_weights()) is not None:
        params = load(file)
        features = [frechet.vgg_features(params, images(paths)) for paths in (drawn, real)]
        found["Frechet distance, VGG-16 features"] = frechet.figure(*features)
    if inception_weights is not None:
        weights = inception.load(inception_weights)
        found["FID"] = frechet.figure(*(inception.features(weights, images(paths)) for paths in (drawn, real)))
    if clip is not None:
        found["CLIP score"] = clip_score(load_scorer(str(clip)), images(drawn), texts)
    return found


def clip_score(scorer: ClipScorer, images: Iterable[np.ndarray], texts: Sequence[str]) -> Figure:
    """How well drawn images fit the texts they were drawn from: mean of max(100 cos, 0), from 0 to 100.

    Scores of different CLIPs are not comparable: report the weights with the number.

    Args:
      images, texts: uint8 [H, W, 3] each, and texts, in the same order.

    Raises:
      UserError: the numbers of texts and images differ, or there are none.
    """
    seen, read = scorer.embed_images(images), scorer.embed_texts(texts)  # [N, D] each, of length 1
    if len(seen) != len(read) or not len(seen):
        raise UserError(f"CLIP score: {len(seen)} images and {len(read)} texts; expected one text an image")
    return intervals.mean(np.maximum(100 * (seen * read).sum(-1), 0.0))
