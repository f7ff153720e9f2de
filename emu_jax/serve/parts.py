"""Parts of a request: texts, and encoded images with the field that holds each -> texts and pixels."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Sequence

import numpy as np

from emu_jax.serve.data_urls import read_data_url
from emu_jax.serve.decoders import Upload
from emu_jax.serve.engine import Engine
from emu_jax.serve.limits import Limits


@dataclasses.dataclass(frozen=True)
class ImageField:
    """An image of a request: its data URL, and the field that holds it."""

    url: str
    where: str


@dataclasses.dataclass(frozen=True)
class FileField:
    """An image file of a form, and the field that holds it."""

    data: bytes
    where: str


async def decode_parts(
    engine: Engine, parts: Sequence[Sequence[str | ImageField | FileField]]
) -> list[list[str | np.ndarray]]:
    """Lists of parts with images uint8 [S, S, 3] of the model's size; what is in several lists is decoded once.

    Raises:
      LimitError: no data URL of an image, no image, or one that needs too much time or memory.
      Busy, Stopping, TimeUp, Failed: as `Decoders.decode`.
    """
    fields = list(dict.fromkeys(part for each in parts for part in each if not isinstance(part, str)))
    if not fields:
        return [[part for part in each if isinstance(part, str)] for each in parts]
    uploads = await asyncio.to_thread(_uploads, fields, engine.limits)
    decoded = await engine.decoders.decode(uploads, engine.plain.config.vision.image_size)
    pixels = {field: images[0] for field, images in zip(fields, decoded, strict=True)}
    return [[part if isinstance(part, str) else pixels[part] for part in each] for each in parts]


def _uploads(fields: Sequence[ImageField | FileField], limits: Limits) -> list[Upload]:
    uploads = []
    for field in fields:
        data = field.data if isinstance(field, FileField) else read_data_url(field.url, field.where)
        limits.check_upload(len(data), field.where)
        uploads.append(Upload(data, field.where))
    return uploads
