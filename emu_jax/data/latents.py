"""The decoder's training data, precomputed: VAE latents of images and the embeddings that condition them.

folder/ examples.array_record   one record per image (`records.py`): key and float32 arrays, see `LatentExample`
        unconditional.npy       [Q, D], the model's embeddings for the empty prompt
        index.json              shapes, counts and provenance; written last
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource

from emu_jax.data.records import pack_record, unpack_record, write_records
from emu_jax.errors import UserError
from emu_jax.storage import replace_text

INDEX, EXAMPLES, UNCONDITIONAL = "index.json", "examples.array_record", "unconditional.npy"
ARRAYS = ("mean", "deviation", "condition", "encoded")


@dataclasses.dataclass(frozen=True)
class LatentExample:
    """One image, as float32 arrays.

    Attributes:
      mean, deviation: [h, w, C], the latents' Gaussian, scaled as the U-Net reads them.
      condition: [Q, D], embeddings generated from everything before the image.
      encoded: [Q, D], embeddings of the image itself.
    """

    key: str
    mean: np.ndarray
    deviation: np.ndarray
    condition: np.ndarray
    encoded: np.ndarray

    def record(self) -> bytes:
        arrays = {name: [np.asarray(getattr(self, name), np.float32).tobytes()] for name in ARRAYS}
        return pack_record({"key": [self.key.encode("utf-8", "replace")]} | arrays)


class Latents:
    """Reads a folder of `emu-jax precompute`; `example` samples latents from their Gaussian."""

    def __init__(self, folder: Path):
        file = folder / INDEX
        if not file.is_file():
            raise UserError(f"config.data.source {folder}: no {INDEX} in it; expected a folder of `emu-jax precompute`")
        self.index: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        self._folder = folder
        self._records = ArrayRecordDataSource([str(folder / EXAMPLES)])
        self.unconditional = np.load(folder / UNCONDITIONAL)
        self.latent_shape = tuple(self.index["latent_shape"])  # h, w, C
        self.condition_shape = tuple(self.index["condition_shape"])  # Q, D
        self.fingerprint = self.index["fingerprint"]

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> LatentExample:
        shapes = (self.latent_shape, self.latent_shape, self.condition_shape, self.condition_shape)
        try:
            fields = unpack_record(self._records[index])
            arrays = [
                np.frombuffer(fields[name][0], np.float32).reshape(shape)
                for name, shape in zip(ARRAYS, shapes, strict=True)
            ]
            return LatentExample(fields["key"][0].decode(), *arrays)
        except (ValueError, KeyError, IndexError) as error:
            raise UserError(
                f"{self._folder / EXAMPLES}[{index}]: not a record of `emu-jax precompute` ({error}); run it again"
            ) from error

    def key(self, index: int) -> str:
        return self[index].key

    def example(self, index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        e = self[index]
        latents = e.mean + e.deviation * rng.standard_normal(e.mean.shape, np.float32)
        return {"latents": latents, "condition": e.condition, "encoded": e.encoded}


def write_latents(
    folder: Path, examples: Iterable[LatentExample], unconditional: np.ndarray, provenance: dict[str, Any]
) -> None:
    """Writes a folder.

    Args:
      unconditional: [Q, D], embeddings for the empty prompt.
      provenance: further entries of the index: where the examples come from.
    """
    folder.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(np.ascontiguousarray(unconditional, np.float32).tobytes())
    shapes: dict[str, list[int]] = {}

    def records() -> Iterable[bytes]:
        for example in examples:
            shapes.update(latent_shape=list(example.mean.shape), condition_shape=list(example.condition.shape))
            record = example.record()
            digest.update(record)
            yield record

    count = write_records(folder / EXAMPLES, records())
    np.save(folder / UNCONDITIONAL, np.asarray(unconditional, np.float32))
    index = {"examples": count, **shapes, "fingerprint": digest.hexdigest(), **provenance}
    replace_text(folder / INDEX, json.dumps(index, indent=2) + "\n")
