"""Files that a person uploaded to the page -> what the model reads, within the limits of the server."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from emu_jax.data.images import decode_image, load_image, resize
from emu_jax.errors import UserError
from emu_jax.generate.chat import VIDEO_SUFFIXES, Video, read_video
from emu_jax.serve.limits import Limits

VIDEO_IMAGES = 8  # that a model sees of a video


def is_video(path: str | Path) -> bool:
    """Whether a file is taken as a video, by its name."""
    return Path(path).suffix.lower() in VIDEO_SUFFIXES


def read_uploads(paths: Sequence[str | Path], limits: Limits, size: int) -> list[np.ndarray | Video]:
    """Images uint8 [size, size, 3] and videos of as many such frames; nothing refers to the files any more.

    Raises:
      UserError: too many, too large, broken, or neither an image nor a video; it names the file.
    """
    limits.check_images(sum(VIDEO_IMAGES if is_video(path) else 1 for path in paths))
    return [_read(Path(path), limits, size) for path in paths]


def read_images(paths: Sequence[str | Path], limits: Limits, size: int) -> list[np.ndarray]:
    """`read_uploads` where videos are none of it."""
    if videos := [Path(path).name for path in paths if is_video(path)]:
        raise UserError(f"{videos[0]}: a video; expected an image here")
    return [image for image in read_uploads(paths, limits, size) if isinstance(image, np.ndarray)]


def _read(path: Path, limits: Limits, size: int) -> np.ndarray | Video:
    try:
        limits.check_upload(path.stat().st_size, path.name)
        if is_video(path):
            return Video([resize(load_image(frame), size) for frame in read_video(Video(path, VIDEO_IMAGES))])
        return resize(decode_image(path.read_bytes(), path.name), size)
    except UserError as error:
        if str(path) in str(error):  # where the server keeps it is nobody's business
            raise UserError(str(error).replace(str(path), path.name)) from None
        raise
    except OSError as error:
        raise UserError(f"{path.name}: the file is gone; upload it again") from error
