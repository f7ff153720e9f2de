"""Drawn images: distances from real ones, and how well they fit their texts.

Distances over the model's own features, and over VGG's where its weights are installed, are computed wherever there are
real images; FID, the CLIP score and CLIP's similarity of two images need weights that the user gives.
"""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from emu_jax.checkpoints.vgg import find_weights, load
from emu_jax.data.clip_scores import ClipScorer, load_scorer
from emu_jax.data.images import load_image
from emu_jax.errors import UserError
from emu_jax.evaluate import intervals
from emu_jax.evaluate.intervals import Figure
from emu_jax.evaluate.metrics import fid, frechet
from emu_jax.evaluate.metrics.figures import Missing, attempt
from emu_jax.generate.model import Emu
from emu_jax.storage import Path, read_json_object


def figures(
    emu: Emu,
    drawn: Sequence[Path],
    real: Sequence[Path],
    texts: Sequence[str],
    *,
    inception_weights: pathlib.Path | None = None,
    fid_rule: str = "crop256",
    fid_statistics: Path | None = None,
    clip: pathlib.Path | None = None,
    missing: Missing | None = None,
) -> dict[str, Figure]:
    """Fréchet distances and CLIP score.

    Args:
      drawn: files of drawn images; `texts` are what they were drawn from.
      real: files of the images to compare with; none leaves FID by `fid_statistics` the only distance.
      inception_weights: file of FID's Inception.
      fid_rule: which pixels Inception sees, one of `fid.RULES`.
      fid_statistics: file of the real images' statistics (`fid.figure`).
      clip: folder of a CLIP.
      missing: takes the reasons of figures that could not be computed.

    Raises:
      UserError: a file of weights, statistics or an image cannot be used, and `missing` is None.
    """

    def images(paths: Sequence[Path]) -> Iterator[np.ndarray]:
        return (load_image(path) for path in paths)

    def own() -> dict[str, Figure]:
        features = [frechet.encoder_features(emu, images(paths)) for paths in (drawn, real)]
        return {"Frechet distance, own features": frechet.figure(*features)}

    def vgg(file: pathlib.Path) -> dict[str, Figure]:
        params = load(file)
        features = [frechet.vgg_features(params, images(paths)) for paths in (drawn, real)]
        return {"Frechet distance, VGG-16 features": frechet.figure(*features)}

    def clip_figure(folder: pathlib.Path) -> dict[str, Figure]:
        return {f"CLIP score, {clip_name(folder)}": clip_score(load_scorer(str(folder)), images(drawn), texts)}

    metrics: dict[str, Callable[[], dict[str, Figure]]] = {}
    if real:
        metrics["Frechet distance, own features"] = own
        if (file := find_weights()) is not None:
            metrics["Frechet distance, VGG-16 features"] = functools.partial(vgg, file)
    if inception_weights is not None:
        settings: dict[str, Any] = {"weights": inception_weights, "rule": fid_rule, "statistics": fid_statistics}
        metrics["FID"] = functools.partial(fid.figure, drawn, real, **settings)
    if clip is not None:
        metrics["CLIP score"] = functools.partial(clip_figure, clip)
    found: dict[str, Figure] = {}
    for name, compute in metrics.items():
        found |= compute() if missing is None else attempt(name, compute, missing)
    return found


def check_unfiltered(emu: Emu, drawn: Path) -> None:
    """Raises UserError if the model has a safety checker, whose black images would be scored.

    Args:
      drawn: the drawings' folder, for the error.
    """
    if emu.decoder is not None and emu.decoder.safety is not None:
        raise UserError(
            f"{drawn}: the model has a safety checker, which makes flagged images black, and they would be scored; "
            "load it with safety_checker=False, and draw into a new folder"
        )


def clip_name(folder: pathlib.Path) -> str:
    """The name of a CLIP: the one in its config.json, otherwise its folder's, e.g. "clip-vit-large-patch14".

    Scores of different CLIPs differ by points, so the figure's name has it.

    Raises:
      UserError: the folder has no config.json.
    """
    config = read_json_object(folder / "config.json", "the config of CLIP weights (Hugging Face)")
    given = config.get("_name_or_path")
    return pathlib.PurePath(given if isinstance(given, str) and given else folder.resolve()).name or folder.name


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
    return intervals.mean(np.maximum(100 * (seen * read).sum(-1), 0.0), paper_scale=1.0)


def clip_similarity(
    scorer: ClipScorer, drawn: Iterable[np.ndarray], real: Iterable[np.ndarray], groups: np.ndarray
) -> Figure:
    """How similar drawn images are to real ones: mean cosine of CLIP's embeddings, from -1 to 1.

    Args:
      drawn, real: uint8 [H, W, 3] each, in the same order.
      groups: int [N], the number of each real image, so that the interval draws whole groups.

    Raises:
      UserError: the numbers of images differ, or there are none.
    """
    ours, theirs = scorer.embed_images(drawn), scorer.embed_images(real)  # [N, D] each, of length 1
    if len(ours) != len(theirs) or not len(ours):
        raise UserError(f"CLIP similarity: {len(ours)} drawn and {len(theirs)} real images; expected as many of both")
    return intervals.mean((ours * theirs).sum(-1), groups=groups, paper_scale=1.0)
