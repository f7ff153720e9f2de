"""The decoder's training data, precomputed: VAE latents of images and the embeddings that condition them.

folder/ examples.array_record-00012   the examples of chunk 12: key and arrays, see `LatentExample`
        unconditional.npy             [Q, D], the model's embeddings for the empty prompt
        index.json                    shapes, counts, a digest of every file, and provenance; written last
        unfinished/                   until then: settings.json, and chunk-00012.json for every chunk that is complete

The source's records are divided into chunks of a fixed number. Any process may write any chunk, in any order, again or
once: the files are the same.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
from collections.abc import Iterable, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from emu_jax.data.examples import Drawn
from emu_jax.data.prepared import file_entry
from emu_jax.data.record_files import RecordFile, RecordFiles
from emu_jax.data.records import pack_record, unpack_record, write_records
from emu_jax.errors import UserError
from emu_jax.storage import Path, read_json_object, remove, replace_text, write_atomically

INDEX, EXAMPLES, UNCONDITIONAL = "index.json", "examples.array_record", "unconditional.npy"
UNFINISHED, SETTINGS = "unfinished", "settings.json"
LATENTS, CONDITION, ENCODED = ("mean", "deviation"), "condition", "encoded"  # names of arrays
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


@dataclasses.dataclass(frozen=True)
class LatentExample:
    """One image, as float32 arrays.

    Attributes:
      mean, deviation: [h, w, C], the latents' Gaussian, scaled as the U-Net reads them.
      condition: [Q, D], embeddings generated from everything before the image.
      encoded: [Q, D], embeddings of the image itself; None where they are not stored.
    """

    key: str
    mean: np.ndarray
    deviation: np.ndarray
    condition: np.ndarray
    encoded: np.ndarray | None = None

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """Those that are stored, by name."""
        found = {name: getattr(self, name) for name in (*LATENTS, CONDITION, ENCODED)}
        return {name: array for name, array in found.items() if array is not None}

    def record(self, dtype: np.dtype) -> bytes:
        stored = {name: [np.asarray(array, dtype).tobytes()] for name, array in self.arrays.items()}
        return pack_record({"key": [self.key.encode("utf-8", "replace")]} | stored)

    def sampled(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """What the U-Net is trained on: latents drawn from their Gaussian, and the embeddings."""
        latents = self.mean + self.deviation * rng.standard_normal(self.mean.shape, np.float32)
        embeddings = {name: array for name, array in self.arrays.items() if name in (CONDITION, ENCODED)}
        return {"latents": latents, **embeddings}


class Latents:
    """Reads a folder of `emu-jax precompute`.

    Args:
      encoded: whether the images' own embeddings are read, too; None reads them if they are stored.

    Raises:
      UserError: there is no such folder, or it lacks what is to be read.
    """

    def __init__(self, folder: Path, *, encoded: bool | None = None):
        file = folder / INDEX
        if not file.is_file():
            more = ""
            if (folder / UNFINISHED).is_dir():
                more = ", which the same command finishes: some parts of it are still to be made"
            raise UserError(
                f"config.data.source {folder}: no {INDEX} in it; expected a folder of `emu-jax precompute`{more}"
            )
        self.index = read_json_object(file, "the index of a folder of `emu-jax precompute`")
        if "arrays" not in self.index:
            raise UserError(f"{file}: it is of an earlier version; run `emu-jax precompute` again")
        self.name, self.remark = str(folder), ""
        self._records = RecordFiles(
            RecordFile(folder / name, entry["records"], entry["bytes"]) for name, entry in self.index["files"].items()
        )
        self.unconditional = np.load(io.BytesIO((folder / UNCONDITIONAL).read_bytes()))
        self._shapes = {name: tuple(shape) for name, shape in self.index["arrays"].items()}
        self.latent_shape = self._shapes["mean"]  # h, w, C
        self.condition_shape = self._shapes[CONDITION]  # Q, D
        self.fingerprint = self.index["fingerprint"]
        if encoded and ENCODED not in self._shapes:
            raise UserError(
                f"config.data.source {folder}: it holds no embeddings of the images themselves; set "
                "config.loss.encoded_share=0, or precompute it again with them"
            )
        if encoded is False:
            self._shapes.pop(ENCODED, None)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> LatentExample:
        return self.read([index])[0]

    def read(self, indices: Sequence[int]) -> list[LatentExample]:
        """The examples at `indices`, read at the same time."""
        return [self._parse(data, index) for data, index in zip(self._records.read(indices), indices, strict=True)]

    def _parse(self, data: bytes, index: int) -> LatentExample:
        dtype = DTYPES[self.index["dtype"]]
        try:
            fields = unpack_record(data)
            arrays = {
                name: np.frombuffer(fields[name][0], dtype).reshape(shape).astype(np.float32)
                for name, shape in self._shapes.items()
            }
            return LatentExample(fields["key"][0].decode(), **arrays)
        except (ValueError, KeyError, IndexError) as error:
            path, position = self._records.file_of(index)
            raise UserError(
                f"{path}[{position}]: not a record of `emu-jax precompute` ({error}); run it again"
            ) from error

    def key(self, index: int) -> str:
        return self[index].key

    def examples(self, drawn: Sequence[Drawn]) -> list[dict[str, np.ndarray]]:
        """Latents that are sampled from their Gaussian, with the embeddings."""
        found = self.read([index for index, _ in drawn])
        return [example.sampled(rng) for example, (_, rng) in zip(found, drawn, strict=True)]


class LatentsFolder:
    """A folder that is being written, by one process or several, now or later.

    Args:
      settings: everything that decides what the files hold, as JSON; the same for all processes.
      about: where they come from; not compared.

    Raises:
      UserError: the folder holds, or is being filled with, examples of other settings.
    """

    def __init__(
        self, folder: Path, chunks: int, dtype: str, settings: dict[str, Any], about: dict[str, Any] | None = None
    ):
        self._folder, self._unfinished = folder, folder / UNFINISHED
        self._count, self._dtype, self._about = chunks, dtype, about or {}
        self._settings = json.loads(json.dumps({**settings, "dtype": dtype, "chunks": chunks}))
        if not self.complete and not (self._unfinished / SETTINGS).exists():
            self._unfinished.mkdir(parents=True, exist_ok=True)
            replace_text(self._unfinished / SETTINGS, json.dumps(self._settings, indent=2) + "\n")
        file = folder / INDEX if self.complete else self._unfinished / SETTINGS
        there = read_json_object(file, "the settings of `emu-jax precompute`")
        for name, value in self._settings.items():
            if there.get(name) != value:
                raise UserError(
                    f"out={folder}: the folder holds examples of other settings: {name} is {there.get(name)!r} there "
                    f"and {value!r} here; name another folder, or remove it"
                )

    @property
    def complete(self) -> bool:
        """Whether the folder is finished."""
        return (self._folder / INDEX).exists()

    def missing(self, part: tuple[int, int] = (0, 1)) -> list[int]:
        """The numbers of the chunks that part I of N has still to write."""
        number, count = part
        return [] if self.complete else [n for n in range(number, self._count, count) if not self._entry(n).exists()]

    def _entry(self, number: int) -> Path:
        return self._unfinished / f"chunk-{number:05d}.json"

    def write(self, number: int, examples: Iterable[LatentExample]) -> None:
        """Writes a chunk; one without examples has no file."""
        shapes: dict[str, list[int]] = {}

        def records() -> Iterable[bytes]:
            for example in examples:
                shapes.update({name: list(array.shape) for name, array in example.arrays.items()})
                yield example.record(DTYPES[self._dtype])

        name = f"{EXAMPLES}-{number:05d}"
        with write_atomically(self._folder / name) as partial:
            entry = file_entry(partial, write_records(partial, records()))
        if not entry["records"]:
            (self._folder / name).unlink()
        replace_text(self._entry(number), json.dumps({"name": name, "arrays": shapes, **entry}) + "\n")

    def finish(self, unconditional: np.ndarray) -> int | None:
        """Completes the folder if no chunk is missing; returns the number of examples then, otherwise None.

        Args:
          unconditional: [Q, D], embeddings for the empty prompt.

        Raises:
          UserError: there are no examples in it at all.
        """
        if not self.complete:
            if self.missing():
                return None
            try:
                entries = [json.loads(self._entry(number).read_text()) for number in range(self._count)]
            except FileNotFoundError:
                if not self.complete:  # otherwise another process has finished it meanwhile
                    raise
            else:
                self._write_index([entry for entry in entries if entry["records"]], unconditional)
        remove(self._unfinished)
        return int(read_json_object(self._folder / INDEX, "the index of a folder of `emu-jax precompute`")["examples"])

    def _write_index(self, entries: Sequence[dict[str, Any]], unconditional: np.ndarray) -> None:
        if not entries:
            raise UserError(f"out={self._folder}: no image of the source became an example")
        digest = hashlib.sha256(np.ascontiguousarray(unconditional, np.float32).tobytes())
        for entry in entries:
            digest.update(entry["sha256"].encode())
        with write_atomically(self._folder / UNCONDITIONAL) as partial, partial.open("wb") as file:
            np.save(file, np.asarray(unconditional, np.float32))
        index = {
            "examples": sum(entry["records"] for entry in entries),
            "arrays": entries[0]["arrays"],
            "fingerprint": digest.hexdigest(),
            "files": {e["name"]: {field: e[field] for field in ("records", "bytes", "sha256")} for e in entries},
            **self._settings,
            **self._about,
        }
        replace_text(self._folder / INDEX, json.dumps(index, indent=2) + "\n")
