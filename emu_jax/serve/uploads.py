"""Files uploaded to the page -> images and videos for the model, within the server's limits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from emu_jax.data.images import decode_image, load_image, resize
from emu_jax.errors import UserError
from emu_jax.generate.messages import VIDEO_SUFFIXES, Video, read_video
from emu_jax.serve.limits import Limits

VIDEO_IMAGES = 8  # frames of a video that are shown to the model


def is_video(path: str | Path) -> bool:
    """Whether a file's suffix is that of a video."""
    return Path(path).suffix.lower() in VIDEO_SUFFIXES


def read_uploads(paths: Sequence[str | Path], limits: Limits, size: int) -> list[np.ndarray | Video]:
    """Images uint8 [size, size, 3], and videos of such frames; the files are not needed any more.

    Raises:
      UserError: too many, too large, broken, or neither image nor video; names the file.
    """
    limits.check_images(sum(VIDEO_IMAGES if is_video(path) else 1 for path in paths))
    return [_read(Path(path), limits, size) for path in paths]


def read_images(paths: Sequence[str | Path], limits: Limits, size: int) -> list[np.ndarray]:
    """`read_uploads` without videos."""
    if videos := [Path(path).name for path in paths if is_video(path)]:
        raise UserError(f"{videos[0]}: a video; expected an image")
    return [image for image in read_uploads(paths, limits, size) if isinstance(image, np.ndarray)]


def _read(path: Path, limits: Limits, size: int) -> np.ndarray | Video:
    try:
        limits.check_upload(path.stat().st_size, path.name)
        if is_video(path):
            return Video([resize(load_image(frame), size) for frame in read_video(Video(path, VIDEO_IMAGES))])
        return resize(decode_image(path.read_bytes(), path.name), size)
    except UserError as error:
        if str(path) in str(error):  # do not reveal where the server stores it
            raise UserError(str(error).replace(str(path), path.name)) from None
        raise
    except OSError as error:
        raise UserError(f"{path.name}: the file is gone; upload it again") from error
