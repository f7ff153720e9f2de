"""The decoder's training data, precomputed: VAE latents of images and the embeddings that condition them.

folder/ examples.array_record-00000   records, in files of about 256 MB: key and float32 arrays, see `LatentExample`
        unconditional.npy             [Q, D], the model's embeddings for the empty prompt
        index.json                    shapes, counts, a digest of every file, and provenance; written last
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from emu_jax.data.examples import Drawn
from emu_jax.data.prepared import file_entry
from emu_jax.data.record_files import RecordFile, RecordFiles
from emu_jax.data.records import pack_record, unpack_record, write_records
from emu_jax.errors import UserError
from emu_jax.storage import Path, read_json_object, replace_text, write_atomically

INDEX, EXAMPLES, UNCONDITIONAL = "index.json", "examples.array_record", "unconditional.npy"
FILE_BYTES = 256 << 20
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
    """Reads a folder of `emu-jax precompute`."""

    def __init__(self, folder: Path):
        file = folder / INDEX
        if not file.is_file():
            raise UserError(f"config.data.source {folder}: no {INDEX} in it; expected a folder of `emu-jax precompute`")
        self.index = read_json_object(file, "the index of a folder of `emu-jax precompute`")
        if "files" not in self.index:
            raise UserError(f"{file}: states no files; run `emu-jax precompute` again")
        self._records = RecordFiles(
            RecordFile(folder / name, entry["records"], entry["bytes"]) for name, entry in self.index["files"].items()
        )
        self.unconditional = np.load(io.BytesIO((folder / UNCONDITIONAL).read_bytes()))
        self.latent_shape = tuple(self.index["latent_shape"])  # h, w, C
        self.condition_shape = tuple(self.index["condition_shape"])  # Q, D
        self.fingerprint = self.index["fingerprint"]

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> LatentExample:
        return self.read([index])[0]

    def read(self, indices: Sequence[int]) -> list[LatentExample]:
        """The examples at `indices`, read at the same time."""
        return [self._parse(data, index) for data, index in zip(self._records.read(indices), indices, strict=True)]

    def _parse(self, data: bytes, index: int) -> LatentExample:
        shapes = (self.latent_shape, self.latent_shape, self.condition_shape, self.condition_shape)
        try:
            fields = unpack_record(data)
            arrays = [
                np.frombuffer(fields[name][0], np.float32).reshape(shape)
                for name, shape in zip(ARRAYS, shapes, strict=True)
            ]
            return LatentExample(fields["key"][0].decode(), *arrays)
        except (ValueError, KeyError, IndexError) as error:
            path, position = self._records.file_of(index)
            raise UserError(
                f"{path}[{position}]: not a record of `emu-jax precompute` ({error}); run it again"
            ) from error

    def key(self, index: int) -> str:
        return self[index].key

    def examples(self, drawn: Sequence[Drawn]) -> list[dict[str, np.ndarray]]:
        """Latents that are sampled from their Gaussian, with the two embeddings."""
        found = self.read([index for index, _ in drawn])
        return [_sampled(example, rng) for example, (_, rng) in zip(found, drawn, strict=True)]


def _sampled(e: LatentExample, rng: np.random.Generator) -> dict[str, np.ndarray]:
    latents = e.mean + e.deviation * rng.standard_normal(e.mean.shape, np.float32)
    return {"latents": latents, "condition": e.condition, "encoded": e.encoded}


def write_latents(
    folder: Path, examples: Iterable[LatentExample], unconditional: np.ndarray, provenance: dict[str, Any]
) -> int:
    """Writes a folder; returns the number of examples. They are not held in memory.

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

    files = _write_files(folder, records())
    with write_atomically(folder / UNCONDITIONAL) as partial, partial.open("wb") as file:
        np.save(file, np.asarray(unconditional, np.float32))
    count = sum(entry["records"] for entry in files.values())
    index = {"examples": count, **shapes, "fingerprint": digest.hexdigest(), "files": files, **provenance}
    replace_text(folder / INDEX, json.dumps(index, indent=2) + "\n")
    return count


def _write_files(folder: Path, records: Iterable[bytes]) -> dict[str, dict[str, Any]]:
    """Writes files of about `FILE_BYTES`, each of which appears when it is complete; returns their entries by name."""
    files: dict[str, dict[str, Any]] = {}
    left = iter(records)
    while (first := next(left, None)) is not None:
        name = f"{EXAMPLES}-{len(files):05d}"
        with write_atomically(folder / name) as partial:
            files[name] = file_entry(partial, write_records(partial, _one_file(itertools.chain([first], left))))
    return files


def _one_file(records: Iterable[bytes]) -> Iterator[bytes]:
    size = 0
    for record in records:
        yield record
        size += len(record)
        if size >= FILE_BYTES:
            return
