"""Fréchet distances between drawn and real images: features [N, F] and [M, F] -> one number, lower is better.

    |mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))

It is FID only over the features of `inception.py`, by the rules of `fid.py`. Distances over VGG-16 or our own encoder,
which need no such weights, have names of their own: compare only numbers of the same name.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
from einops import rearrange

from emu_jax.data.images import resize
from emu_jax.errors import UserError
from emu_jax.evaluate import vgg
from emu_jax.evaluate.intervals import Figure, bootstrap
from emu_jax.evaluate.metrics.features import in_batches
from emu_jax.generate.model import Emu
from emu_jax.models.vgg import CHANNELS, Params


class Moments(NamedTuple):
    """Mean and covariance of features, float64.

    Attributes:
      mean: [F].
      factor: A [K, F] with A^T A the covariance; K is the smaller of N and F.
      total: the covariance's trace.
    """

    mean: np.ndarray
    factor: np.ndarray
    total: float


def distance(generated: np.ndarray, real: np.ndarray) -> float:
    """Fréchet distance of the normal distributions with the features' means and covariances, in float64.

    >>> features = np.random.default_rng(0).normal(size=(50, 3))
    >>> round(distance(features + np.array([2.0, 0.0, 0.0]), features), 6)  # shifted by 2: its square
    4.0

    tr (C_a C_b)^(1/2) is the sum of the singular values of A B^T where C_a = A^T A and C_b = B^T B. So no covariance is
    computed, and none needs regularisation when there are fewer images than features.

    Args:
      generated, real: [N, F] and [M, F]; N and M at least 2.

    Raises:
      UserError: the shapes do not match, there are too few images, or a feature is not finite.
    """
    _check_features({"drawn": generated, "real": real})
    return _between(_moments(generated), _moments(real))


def moments(features: np.ndarray) -> Moments:
    """Mean and covariance of real images' features [M, F].

    Raises:
      UserError: there are fewer than two images, or a feature is not finite.
    """
    _check_features({"real": features})
    return _moments(features)


def from_statistics(mu: np.ndarray, sigma: np.ndarray) -> Moments:
    """Mean [F] and covariance [F, F] -> the same with the covariance factored.

    >>> known = moments(np.random.default_rng(0).normal(size=(50, 3)))
    >>> same = from_statistics(known.mean, known.factor.T @ known.factor)
    >>> bool(np.allclose(same.factor.T @ same.factor, known.factor.T @ known.factor))
    True
    """
    values, vectors = np.linalg.eigh(sigma)
    # Rounding leaves tiny negative eigenvalues where there were fewer images than features.
    return Moments(mu, np.sqrt(values.clip(0))[:, None] * vectors.T, float(np.trace(sigma)))


def _between(generated: Moments, real: Moments) -> float:
    (mean_a, a, total_a), (mean_b, b, total_b) = generated, real
    overlap = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    return max(float(np.square(mean_a - mean_b).sum() + total_a + total_b - 2 * overlap), 0.0)


def _moments(features: np.ndarray) -> Moments:
    features = np.asarray(features, np.float64)
    mean = features.mean(0)
    centred = (features - mean) / math.sqrt(len(features) - 1)
    factor = np.asarray(np.linalg.qr(centred, mode="r")) if len(features) > features.shape[1] else centred
    return Moments(mean, factor, float(np.square(centred).sum()))


def _check_features(given: Mapping[str, np.ndarray], width: int | None = None) -> None:
    """Raises UserError unless features are finite and [N, F], with N of at least 2 and one F, or `width`."""
    shapes = [list(np.shape(features)) for features in given.values()]
    widths = {tuple(shape[1:]) for shape in shapes} | (set() if width is None else {(width,)})
    if len(widths) != 1 or len(next(iter(widths))) != 1:
        known = [] if width is None else [f"[M, {width}]"]
        shown = " and ".join([*map(str, shapes), *known])
        raise UserError(f"features {shown} cannot be compared; expected [N, F] and [M, F]")
    if min(shape[0] for shape in shapes) < 2:
        counts = " and ".join(f"{shape[0]} {name}" for name, shape in zip(given, shapes, strict=True))
        raise UserError(f"{counts} images; a Frechet distance needs two or more of each")
    for name, features in given.items():
        if not np.isfinite(features).all():
            row = int((~np.isfinite(features)).any(1).argmax())
            raise UserError(f"{name} image {row}: its features are not finite; expected numbers")


def figure(generated: np.ndarray, real: np.ndarray | Moments, *, draws: int = 100, seed: int = 0) -> Figure:
    """The distance, with an interval of its variation from one set of drawn images to another.

    Only drawn images are resampled: the real ones are fixed by the benchmark. The percentiles are shifted down, as
    `bootstrap` says of distances. That does not correct the bias of the value itself: a Fréchet distance falls as
    images are added, so compare only distances over equally many images.

    Args:
      generated: features of drawn images, [N, F].
      real: features of real images, [M, F], or their mean and covariance.
      draws: resamples; each costs as much as the distance. 0 leaves the interval out (nan).
    """
    if isinstance(real, Moments):
        _check_features({"drawn": generated}, len(real.mean))
        known = real
    else:
        _check_features({"drawn": generated, "real": real})
        known = _moments(real)
    value = _between(_moments(generated), known)
    if draws == 0:
        return Figure(value, (math.nan, math.nan), None, len(generated))
    count = len(generated)
    low, high = bootstrap(
        lambda index: _between(_moments(generated[index]), known), count, draws=draws, seed=seed, around=value
    )
    return Figure(value, (max(low, 0.0), high), None, count)


def vgg_features(params: Params, images: Iterable[np.ndarray]) -> np.ndarray:
    """Images uint8 [H, W, 3] -> float32 [N, 1472]: VGG-16, normalised at each position, averaged over positions."""
    cells = vgg.GRID**2
    ends = np.cumsum(CHANNELS) * cells

    def run(batch: list[np.ndarray]) -> np.ndarray:
        parts = np.split(vgg.features(params, batch), ends[:-1], axis=1)
        return np.concatenate([rearrange(part, "n (g c) -> n g c", g=cells).mean(1) for part in parts], axis=1)

    return in_batches(run, images)


def encoder_features(emu: Emu, images: Iterable[np.ndarray]) -> np.ndarray:
    """Images uint8 [H, W, 3] -> float32 [N, D]: Emu's visual embeddings, averaged over queries."""
    size = emu.config.vision.image_size
    return in_batches(lambda batch: emu.encode_images(np.stack([resize(x, size) for x in batch])).mean(1), images)
