"""Bytes through everything that decodes an image, and what may come of it: pixels, or one error with fixed words."""

import time
import warnings
from typing import NamedTuple

import numpy as np

from emu_jax.data.decoding import MAX_PIXELS, ImageError, ignore_warnings
from emu_jax.data.images import EncodedImage, Recoding, decode_image, shape_of
from emu_jax.data.video import VideoError, read_frames

WAYS = {
    "decode_image": lambda data: decode_image(data, "a.jpg"),
    "reference": lambda data: decode_image(data, "a.jpg", reading="reference"),
    "recode": lambda data: Recoding(64, min_side=1, max_aspect=1e9).recode(data, "a.jpg"),
    "shape_of": lambda data: shape_of(data, "a.jpg"),
    "record": lambda data: EncodedImage(data, 8, "a.jpg")(),
    "frames": lambda data: read_frames(data, 2),
}


class Escape(AssertionError):
    """What must not happen."""


class Decoded(NamedTuple):
    """What came of it.

    Attributes:
      refused: whether `decode_image` refused it.
      seconds: CPU time of the slowest of its readings.
    """

    refused: bool
    seconds: float


def decode_anyhow(data: bytes) -> Decoded:
    """Reads it in every way.

    Raises:
      Escape: another exception, an error whose words differ the second time or are not printable, or a warning.
    """
    refused, slowest = False, 0.0
    for name, way in WAYS.items():
        if name == "frames" and data[:4] not in (b"GIF8", b"\x89PNG", b"RIFF"):
            continue  # PyAV's
        start = time.process_time()
        first = _outcome(name, way, data)
        slowest = max(slowest, time.process_time() - start)
        if first is not None and first != _outcome(name, way, data):
            raise Escape(f"{name}: the words differ")
        refused |= name == "decode_image" and first is not None
    return Decoded(refused, slowest)


def _outcome(name: str, way, data: bytes) -> str | None:
    """The error's words; None for pixels."""
    said: list[warnings.WarningMessage] = []
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            ignore_warnings()  # pytest has undone it
            found = way(data)
    except (ImageError, VideoError) as error:
        if not str(error).isprintable() or len(str(error)) > 300 or " at 0x" in str(error):
            raise Escape(f"{name}: {str(error)!a}") from error
        if not said:
            return str(error)
    except BaseException as error:
        raise Escape(f"{name}: {type(error).__name__}: {error}"[:200]) from error
    if said:
        raise Escape(f"{name}: {said[0].message}"[:200])
    if isinstance(found, np.ndarray) and (found.dtype != np.uint8 or found.ndim != 3 or found.size > 3 * MAX_PIXELS):
        raise Escape(f"{name}: {found.dtype} {found.shape}")
    return None
