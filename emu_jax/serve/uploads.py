"""Files uploaded to the page -> images and videos for the model, within the server's limits."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from emu_jax.errors import UserError
from emu_jax.generate.messages import VIDEO_SUFFIXES, Video
from emu_jax.serve.decoders import Upload
from emu_jax.serve.decoding_worker import VIDEO_IMAGES
from emu_jax.serve.engine import Engine
from emu_jax.serve.limits import Limits


def is_video(path: str | Path) -> bool:
    """Whether a file's suffix is that of a video."""
    return Path(path).suffix.lower() in VIDEO_SUFFIXES


async def read_uploads(engine: Engine, paths: Sequence[str | Path]) -> list[np.ndarray | Video]:
    """Images uint8 [S, S, 3] of the model's size, and videos of such frames; the files are not needed any more.

    Raises:
      UserError: too many, too large, broken, neither image nor video, or too slow to decode; names the file.
      Busy, Stopping, TimeUp, Failed: as `Decoders.decode`.
    """
    engine.limits.check_images(sum(VIDEO_IMAGES if is_video(path) else 1 for path in paths))
    uploads = await asyncio.to_thread(lambda: [_read(Path(path), engine.limits) for path in paths])
    decoded = await engine.decoders.decode(uploads, engine.plain.config.vision.image_size)
    return [
        Video(list(images)) if upload.is_video else images[0] for upload, images in zip(uploads, decoded, strict=True)
    ]


async def read_images(engine: Engine, paths: Sequence[str | Path]) -> list[np.ndarray]:
    """`read_uploads` without videos."""
    if videos := [Path(path).name for path in paths if is_video(path)]:
        raise UserError(f"{videos[0]}: a video; expected an image")
    return [image for image in await read_uploads(engine, paths) if isinstance(image, np.ndarray)]


def _read(path: Path, limits: Limits) -> Upload:
    """The file, by its name alone: where the server stores it is not revealed."""
    try:
        limits.check_upload(path.stat().st_size, path.name)
        return Upload(path.read_bytes(), path.name, is_video(path))
    except OSError as error:
        raise UserError(f"{path.name}: the file is gone; upload it again") from error
