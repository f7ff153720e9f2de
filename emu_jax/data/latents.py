"""What the decoder trains on, computed once: latents of images beside the embeddings that condition them.

folder/ examples.array_record   a record an image: JSON header, then float32 mean, deviation, condition, encoded
        unconditional.npy       [Q, D], the model's own embeddings for the empty prompt
        index.json              shapes, counts and where it all came from; written last
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

INDEX, EXAMPLES, UNCONDITIONAL = "index.json", "examples.array_record", "unconditional.npy"


@dataclasses.dataclass(frozen=True)
class LatentExample:
    """One image: latents' mean and standard deviation [h, w, C], scaled; condition and encoded [Q, D]; float32."""

    key: str
    mean: np.ndarray
    deviation: np.ndarray
    condition: np.ndarray  # generated from what stands before the image
    encoded: np.ndarray  # the image's own embeddings

    def record(self) -> bytes:
        arrays = (self.mean, self.deviation, self.condition, self.encoded)
        return pack_record({"key": self.key}, b"".join(np.asarray(a, np.float32).tobytes() for a in arrays))


class Latents:
    """Reads a folder; `example` draws latents from their Gaussian."""

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
        where = f"{self._folder / EXAMPLES}[{index}]"
        header, data = unpack_record(self._records[index], where)
        values = np.frombuffer(data, np.float32)
        latents, condition = np.prod(self.latent_shape), np.prod(self.condition_shape)
        if len(values) != 2 * (latents + condition):
            raise UserError(
                f"{where}: {len(values)} numbers, expected {2 * (latents + condition)}; run `emu-jax precompute` again"
            )
        mean, deviation, generated, encoded = np.split(values, np.cumsum([latents, latents, condition]))
        return LatentExample(
            header["key"],
            mean.reshape(self.latent_shape),
            deviation.reshape(self.latent_shape),
            generated.reshape(self.condition_shape),
            encoded.reshape(self.condition_shape),
        )

    def example(self, index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        e = self[index]
        latents = e.mean + e.deviation * rng.standard_normal(e.mean.shape, np.float32)
        return {"latents": latents, "condition": e.condition, "encoded": e.encoded}


def write_latents(
    folder: Path, examples: Iterable[LatentExample], unconditional: np.ndarray, source: dict[str, Any]
) -> None:
    """Writes a folder; `source` says where the examples came from and enters the index."""
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
    index = {"examples": count, **shapes, "fingerprint": digest.hexdigest(), **source}
    partial = folder / (INDEX + ".partial")
    partial.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    partial.replace(folder / INDEX)
