"""FID: which pixels Inception sees, the statistics of the real images as a file, and the figure's name.

    files ─ read_image ─ uint8 [H, W, 3] ─ a rule ─ float32 [299, 299, 3] ─ Inception ─ [N, 2048] ─ Fréchet distance

    crop256   centre crop, antialiased resize to 256 x 256, then as native: what papers report for COCO's captions
    clean     antialiased resize to 299 x 299 in float, without a crop: clean-fid ("On Aliased Resizing", 2104.11222)
    native    resize to 299 x 299 without antialiasing: pytorch-fid on the files as they are

Rules differ by points over the same images, and so do different numbers of images: the name of a figure tells both.
"""

from __future__ import annotations

import io
import pathlib
import zipfile
from collections.abc import Sequence

import jax
import numpy as np
from PIL import Image as PIL

from emu_jax.data.images import decode_image, fitted, read_file
from emu_jax.errors import UserError
from emu_jax.evaluate.intervals import Figure
from emu_jax.evaluate.metrics import frechet, inception
from emu_jax.evaluate.metrics.frechet import Moments
from emu_jax.storage import Path, write_atomically

RULES = {"crop256": "256 crop", "clean": "clean", "native": "native size"}  # rule -> its words in a figure's name
CROP = 256  # pixels of a side


def check_rule(rule: str) -> None:
    """Raises UserError unless `rule` is in `RULES`."""
    if rule not in RULES:
        raise UserError(f"fid={rule!r}: unknown; choose one of {', '.join(RULES)}")


def read_image(path: Path) -> np.ndarray:
    """An image file -> uint8 [H, W, 3] as Pillow's convert("RGB") gives it, on which the field's tools agree.

    `load_image` rotates by the EXIF tag and lays transparency on white; this does neither.

    Raises:
      ImageError: the file is missing, too large or not a readable image.
    """
    return decode_image(read_file(path), str(path), reading="reference")


def network_input(pixels: np.ndarray, rule: str) -> np.ndarray | jax.Array:
    """uint8 [H, W, 3] -> float32 [299, 299, 3], in [-1, 1]; with the rule clean in [-1, 0.992], as clean-fid scales.

    >>> white = np.full((300, 400, 3), 255, np.uint8)
    >>> [f"{np.asarray(network_input(white, rule)).max():.3f}" for rule in RULES]
    ['1.000', '0.992', '1.000']

    Raises:
      UserError: there is no such rule.
    """
    check_rule(rule)
    if rule == "clean":
        return (_resize_clean(pixels) - 128) / 128
    return inception.resize(fitted(pixels, CROP, "crop") if rule == "crop256" else pixels)


def _resize_clean(pixels: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] -> float32 [299, 299, 3] in [0, 255]: bicubic, antialiased and never rounded."""
    size = (inception.SIZE, inception.SIZE)
    channels = [PIL.fromarray(channel).resize(size, PIL.Resampling.BICUBIC) for channel in _planes(pixels)]
    return np.stack([np.asarray(channel) for channel in channels], axis=-1).clip(0, 255)  # bicubic overshoots


def _planes(pixels: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] -> float32 [3, H, W]."""
    return np.ascontiguousarray(pixels.transpose(2, 0, 1), np.float32)


def features(params: inception.Params, files: Sequence[Path], rule: str) -> np.ndarray:
    """Image files -> float32 [N, 2048]."""
    return inception.features(params, map(read_image, files), prepare=lambda pixels: network_input(pixels, rule))


def figure(
    drawn: Sequence[Path],
    real: Sequence[Path],
    *,
    weights: pathlib.Path,
    rule: str = "crop256",
    statistics: Path | None = None,
) -> dict[str, Figure]:
    """FID by its name, such as "FID, 256 crop, 30,000 images".

    Args:
      drawn, real: image files.
      weights: Inception's, in pytorch-fid's file.
      rule: one of `RULES`.
      statistics: .npz file of the real images' statistics, used in place of `real`; it is written if there is none.
        The figure's name then has the file's.

    Raises:
      UserError: there is no such rule; a file cannot be read, is of another rule or cannot be written.
    """
    check_rule(rule)
    params = inception.load(weights)
    if statistics is not None and statistics.is_file():
        known = read_statistics(statistics, rule)
    else:
        known = frechet.moments(features(params, real, rule))
        if statistics is not None:
            write_statistics(statistics, known, rule)
    against = f" against {statistics.name}" if statistics is not None else ""
    name = f"FID, {RULES[rule]}, {len(drawn):,} images{against}"
    return {name: frechet.figure(features(params, drawn, rule), known)}


# ---------------------------------------------------------------- statistics as a file


def write_statistics(path: Path, known: Moments, rule: str) -> None:
    """Writes `mu` [2048] and `sigma` [2048, 2048], float64, as pytorch-fid does, and the rule; atomically.

    Raises:
      UserError: the file cannot be written.
    """
    try:
        with write_atomically(path) as partial, partial.open("wb") as file:
            np.savez(file, mu=known.mean, sigma=known.factor.T @ known.factor, rule=np.array(rule))
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error}); expected a file's path") from error


def read_statistics(path: Path, rule: str) -> Moments:
    """Statistics of real images, by this package or by pytorch-fid and clean-fid, whose files do not tell their rule.

    Raises:
      UserError: the file cannot be read, its arrays are of other shapes or not finite, or it is of another rule.
    """
    expected = "expected an .npz file with mu [2048] and sigma [2048, 2048], as pytorch-fid --save-stats writes it"
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as archive:
            mu, sigma = (np.asarray(archive[name], np.float64) for name in ("mu", "sigma"))
            stored = str(archive["rule"]) if "rule" in archive else rule
    except KeyError as error:
        raise UserError(f"{path}: {error.args[0]}; {expected}") from error
    except (OSError, ValueError, EOFError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: cannot be read ({str(error).partition(chr(10))[0]}); {expected}") from error
    size = inception.FEATURES
    if mu.shape != (size,) or sigma.shape != (size, size):
        raise UserError(f"{path}: mu is {list(mu.shape)} and sigma {list(sigma.shape)}; {expected}")
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise UserError(f"{path}: holds values that are not finite; compute the statistics again")
    if stored != rule:
        raise UserError(
            f"{path}: statistics of --fid {stored}, not {rule}; ask for --fid {stored}, or name another file"
        )
    return frechet.from_statistics(mu, sigma)
