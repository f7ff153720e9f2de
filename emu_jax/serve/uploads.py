"""Files that a person uploaded to the page -> what the model reads, within the limits of the server."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from emu_jax.data.images import decode_image, load_image, resize
from emu_jax.errors import UserError
from emu_jax.generate.chat import FILM_SUFFIXES, Film, read_film
from emu_jax.serve.limits import Limits

FILM_PICTURES = 8  # that a model sees of a film


def is_film(path: str | Path) -> bool:
    """Whether a file is taken as a film, by its name."""
    return Path(path).suffix.lower() in FILM_SUFFIXES


def read_uploads(paths: Sequence[str | Path], limits: Limits, size: int) -> list[np.ndarray | Film]:
    """Pictures uint8 [size, size, 3] and films of as many such frames; nothing refers to the files any more.

    Raises:
      UserError: too many, too large, broken, or neither a picture nor a film; it names the file.
    """
    limits.check_pictures(sum(FILM_PICTURES if is_film(path) else 1 for path in paths))
    return [_read(Path(path), limits, size) for path in paths]


def read_pictures(paths: Sequence[str | Path], limits: Limits, size: int) -> list[np.ndarray]:
    """`read_uploads` where films are none of it."""
    if films := [Path(path).name for path in paths if is_film(path)]:
        raise UserError(f"{films[0]}: a film; expected a picture here")
    return [picture for picture in read_uploads(paths, limits, size) if isinstance(picture, np.ndarray)]


def _read(path: Path, limits: Limits, size: int) -> np.ndarray | Film:
    try:
        limits.check_upload(path.stat().st_size, path.name)
        if is_film(path):
            return Film([resize(load_image(frame), size) for frame in read_film(Film(path, FILM_PICTURES))])
        return resize(decode_image(path.read_bytes(), path.name), size)
    except UserError as error:
        if str(path) in str(error):  # where the server keeps it is nobody's business
            raise UserError(str(error).replace(str(path), path.name)) from None
        raise
    except OSError as error:
        raise UserError(f"{path.name}: the file is gone; upload it again") from error
