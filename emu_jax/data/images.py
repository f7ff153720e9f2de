"""Pictures from bytes, files and arrays to uint8 [H, W, 3].

A picture's header is read before its pixels: what would decode to more than `MAX_PIXELS` is refused.
"""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
from PIL import Image as PIL
from PIL import ImageOps

from emu_jax.errors import UserError

MAX_PIXELS = 50_000_000


def decode_image(data: bytes, where: str) -> np.ndarray:
    """Encoded bytes -> uint8 [H, W, 3]; `where` names the picture in errors."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PIL.DecompressionBombWarning)  # our own limit is lower
            picture = PIL.open(io.BytesIO(data))
            _check_size(picture, where)
            picture.load()
    except UserError:
        raise
    except PIL.DecompressionBombError as error:  # from Pillow's own limit, before it tells the size
        raise UserError(
            f"{where}: {error.args[0].split(', ')[0]}; expected at most {MAX_PIXELS // 1_000_000} megapixels, "
            "scale it down"
        ) from error
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(
            f"{where}: not a readable picture ({error}); expected a whole PNG, JPEG or WebP file"
        ) from error
    return flatten(picture)


def _check_size(picture: PIL.Image, where: str) -> None:
    width, height = picture.size
    if width * height > MAX_PIXELS:
        raise UserError(
            f"{where}: {width} x {height} pixels; expected at most {MAX_PIXELS // 1_000_000} megapixels, scale it down"
        )


def flatten(picture: PIL.Image) -> np.ndarray:
    """PIL picture -> uint8 [H, W, 3], upright by its EXIF tag, transparency on white."""
    picture = ImageOps.exif_transpose(picture)
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        white = PIL.new("RGBA", picture.size, "white")
        picture = PIL.alpha_composite(white, picture)
    return np.asarray(picture.convert("RGB"))


def load_image(picture: PIL.Image | np.ndarray | Path) -> np.ndarray:
    """A PIL image, a uint8 array [H, W, 3] or a file's path -> uint8 [H, W, 3]."""
    if isinstance(picture, Path):
        if not picture.is_file():
            raise UserError(f"{picture}: no such picture file")
        return decode_image(picture.read_bytes(), str(picture))
    if isinstance(picture, PIL.Image):
        _check_size(picture, "picture")
        return flatten(picture)
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
        raise UserError(f"picture array: expected uint8 [H, W, 3], got {picture.dtype} {list(picture.shape)}")
    return picture


def resize(pixels: np.ndarray, size: int) -> np.ndarray:
    """uint8 [H, W, 3] -> uint8 [size, size, 3], bicubic and straight (no crop), as the reference does."""
    if pixels.shape[:2] == (size, size):
        return pixels
    return np.asarray(PIL.fromarray(pixels).resize((size, size), PIL.Resampling.BICUBIC))
