"""Drawn images: distances from real ones, and how well they fit their texts.

Distances over the model's own features, and over VGG's where its weights are installed, are always computed; FID and
the CLIP score need weights that the user gives.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterator, Sequence

import numpy as np

from emu_jax.data.images import load_image
from emu_jax.evaluate import vgg
from emu_jax.evaluate.intervals import Figure
from emu_jax.evaluate.metrics import clip_score, frechet, inception
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
    if (file := vgg.find_weights()) is not None:
        params = vgg.load(file)
        features = [frechet.vgg_features(params, images(paths)) for paths in (drawn, real)]
        found["Frechet distance, VGG-16 features"] = frechet.figure(*features)
    if inception_weights is not None:
        weights = inception.load(inception_weights)
        found["FID"] = frechet.figure(*(inception.features(weights, images(paths)) for paths in (drawn, real)))
    if clip is not None:
        from emu_jax.data.clip_scores import load_scorer

        found[clip_score.CLIP_SCORE] = clip_score.figure(load_scorer(str(clip)), images(drawn), texts)
    return found
