"""Checkpoints without an optimizer, written and read one slice at a time, whatever their size.

    folder/ <item>/<leaf>/ chunks   params, and lora and unused if there are any; Orbax restores them, sharded or whole
            meta                    like a training checkpoint's (checkpoints/store.py), with a digest of every leaf

Arrays are Zarr, with one chunk or more per layer, so that each host of a mesh reads little more than its own part. An
unfinished folder is called `<folder>.partial`; writing it can be resumed, and it is renamed once it is complete.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import tensorstore as ts

from emu_jax.checkpoints.store import CorruptCheckpoint, seal_meta
from emu_jax.errors import UserError
from emu_jax.storage import partial_path, remove

CHUNK = 32 << 20  # maximum size of a chunk in bytes
PROGRESS = "progress.jsonl"
ZARR_DTYPES = {
    np.dtype(ml_dtypes.bfloat16): "bfloat16",
    np.dtype(np.float16): "<f2",
    np.dtype(np.float32): "<f4",
    np.dtype(np.float64): "<f8",
    np.dtype(np.int8): "|i1",
}

Leaves = Mapping[str, tuple[tuple[int, ...], np.dtype]]  # name, such as params/ln_visual/scale -> shape, dtype


def digest(value: np.ndarray, shape: tuple[int, ...], layer: int | None = None) -> int:
    """A slice's share of its leaf's digest; the shares of all slices add up to the digest, modulo 2^32.

    The digest is that of `checkpoints/store.py`: the sum of word * multiplier. Multipliers grow linearly along every
    axis, so sums along the other axes are enough, and no array of multipliers is needed.
    """
    words = _words(value if layer is None else value[None])
    shape = (*shape, *words.shape[len(shape) :])
    steps = [2 * math.prod(2 * size + 1 for size in shape[axis + 1 :]) for axis in range(len(shape))]
    first = math.prod(2 * size + 1 for size in shape)
    if layer is not None:
        first += layer * steps[0]
    total = first * int(words.sum(dtype=np.uint32))
    for axis, step in enumerate(steps):
        others = tuple(a for a in range(words.ndim) if a != axis)
        along = words.sum(axis=others, dtype=np.uint32)
        total += step * int((along * np.arange(len(along), dtype=np.uint32)).sum(dtype=np.uint32))
    return total % 2**32


def _words(value: np.ndarray) -> np.ndarray:
    """The bits of an array as unsigned integers."""
    unsigned = {1: np.uint8, 2: np.uint16, 4: np.uint32}.get(value.dtype.itemsize)
    if unsigned is None:  # 8 bytes: two words per element, on an axis of their own
        return np.ascontiguousarray(value).view(np.uint32).reshape(*value.shape, 2)
    return value.view(unsigned)


def _chunk(shape: tuple[int, ...], itemsize: int, stacked: bool) -> list[int]:
    """Chunks of one layer, halved along the longest axes until they are small enough."""
    chunk = list(shape)
    if stacked:
        chunk[0] = 1
    while math.prod(chunk) * itemsize > CHUNK:
        axis = max(range(len(chunk)), key=lambda a: chunk[a])
        chunk[axis] = -(-chunk[axis] // 2)
    return [max(size, 1) for size in chunk]


def _place(folder: Path, name: str) -> tuple[Path, str]:
    """The item's folder, and the leaf's name in it in Orbax's spelling."""
    item, _, path = name.partition("/")
    return folder / item, path.replace("/", ".")


class LeafWriter:
    """Writes a folder of leaves.

    Args:
      folder: must not exist. `<folder>.partial` may: it is resumed if the same `job` began it, and replaced otherwise.
      leaves: everything that will be written. stacked: leaves that are written one layer at a time.
      job: a fingerprint of the sources and of the result.
    """

    def __init__(self, folder: Path, leaves: Leaves, stacked: Collection[str], job: str):
        if folder.exists():
            raise UserError(f"{folder}: it exists; name a new folder, or remove it")
        self.folder, self.partial = folder, partial_path(folder)
        self.leaves, self._stacked = dict(leaves), set(stacked)
        self._arrays: dict[str, Any] = {}
        self.digests = dict.fromkeys(self.leaves, 0)
        self.done: set[int] = set()
        progress = self.partial / PROGRESS
        if not self._resume(progress, job):
            remove(self.partial)
            try:
                self.partial.mkdir(parents=True)
                progress.write_text(json.dumps({"job": job}) + "\n", encoding="utf-8")
            except OSError as error:
                raise UserError(f"{folder}: cannot be written ({error.strerror})") from error
        self._progress = progress.open("a", encoding="utf-8")

    def _resume(self, progress: Path, job: str) -> bool:
        """Reads what an earlier run has written; False if there is nothing to resume."""
        if not progress.is_file():
            return False
        lines = progress.read_text(encoding="utf-8").split("\n")[:-1]  # an unfinished last line is lost work
        if not lines or json.loads(lines[0]) != {"job": job}:
            return False
        for line in lines[1:]:
            record = json.loads(line)
            self.done.add(record["slice"])
            for leaf, share in record["digests"].items():
                self.digests[leaf] = (self.digests[leaf] + share) % 2**32
        with progress.open("r+b") as file:  # what is appended must not join an unfinished line
            file.truncate(sum(len(line.encode()) + 1 for line in lines))
        return True

    def write(self, number: int, layer: int | None, values: Mapping[str, np.ndarray]) -> None:
        """Writes one layer (None: all) of each of the leaves in `values`; it is on disk when this returns.

        Args:
          number: identifies the write; a resumed job skips those in `done`.
        """
        shares = {}
        for name, value in values.items():
            shape, dtype = self.leaves[name]
            array = self._arrays.get(name)
            if array is None:
                array = self._arrays[name] = self._create(name, shape, dtype)
            value = value.astype(dtype, copy=False)
            shares[name] = digest(value, shape, layer)
            (array if layer is None else array[layer]).write(value).result()
        self._progress.write(json.dumps({"slice": number, "digests": shares}) + "\n")
        self._progress.flush()
        self.done.add(number)
        for name, share in shares.items():
            self.digests[name] = (self.digests[name] + share) % 2**32

    def _create(self, name: str, shape: tuple[int, ...], dtype: np.dtype) -> Any:
        item, leaf = _place(self.partial, name)
        spec = {
            "driver": "zarr",
            "kvstore": {"driver": "file", "path": f"{(item / leaf).resolve()}/"},
            "metadata": {
                "shape": list(shape),
                "chunks": _chunk(shape, dtype.itemsize, name in self._stacked),
                "dtype": ZARR_DTYPES[dtype],
                "compressor": None,  # weights hardly shrink, and compressing is slow
                "dimension_separator": ".",
            },
        }
        return ts.open(spec, open=True, create=True).result()

    def finish(self, holds: str, meta: Mapping[str, Any], beside: Mapping[str, Path]) -> None:
        """Adds the metadata, moves the folders `beside` in, and gives the folder its name.

        Args:
          holds: what the parameters are. meta: the rest of the metadata, without leaves and digests.
        """
        self._progress.close()
        by_item: dict[str, dict[str, tuple[int, ...]]] = {}
        for name, (shape, _) in self.leaves.items():
            item, _, path = name.partition("/")
            by_item.setdefault(item, {})[path] = shape
        for item, shapes in by_item.items():
            (self.partial / item / "_METADATA").write_text(json.dumps(_orbax_metadata(shapes)), encoding="utf-8")
        described = {name: [list(shape), dtype.name] for name, (shape, dtype) in self.leaves.items()}
        (self.partial / "meta").mkdir(exist_ok=True)
        text = json.dumps(seal_meta({"holds": holds, **meta, "leaves": described, "digests": self.digests}))
        (self.partial / "meta" / "metadata").write_text(text, encoding="utf-8")
        for name, origin in beside.items():
            remove(self.partial / name)  # moved in before, by a run that was killed right here
            os.replace(origin, self.partial / name)
        (self.partial / PROGRESS).unlink()
        os.replace(self.partial, self.folder)

    def discard(self) -> None:
        """Removes everything that was written."""
        self._progress.close()
        remove(self.partial)


def _orbax_metadata(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Describes an item's tree to Orbax."""
    tree = {}
    for path, shape in shapes.items():
        keys = tuple(path.split("/"))
        tree[str(keys)] = {
            "key_metadata": [{"key": key, "key_type": 2} for key in keys],
            "value_metadata": {"value_type": "jax.Array", "skip_deserialize": False, "write_shape": list(shape)},
        }
    return {"tree_metadata": tree, "use_ocdbt": False, "use_zarr3": False, "custom_metadata": None}


class LeafReader:
    """Reads leaves of any checkpoint, slice by slice if its chunks allow it, and checks their digests.

    Args:
      folder: a checkpoint. meta: its metadata (`store.read_meta`).
      ema: leaf -> the leaf that is read in its place (`Checkpoint.ema`), whose dtype may differ from `dtypes`.
    """

    def __init__(self, folder: Path, meta: Mapping[str, Any], ema: Mapping[str, str] | None = None):
        self.folder = folder
        self.shapes = {name: tuple(shape) for name, (shape, _) in meta["leaves"].items()}
        self.dtypes = {name: np.dtype(word) for name, (_, word) in meta["leaves"].items()}
        self._digests = meta["digests"]
        self._ema = ema or {}

    def slices(self, name: str) -> Iterable[np.ndarray]:
        """A leaf's layers in order; raises UserError at the end if their digest is not the one that was written."""
        array, shape = self._open(name), self.shapes[name]
        total = 0
        if array.chunk_layout.read_chunk.shape[0] == 1:
            for layer in range(shape[0]):
                value = np.asarray(array[layer].read().result())
                total += digest(value, shape, layer)
                yield value
        else:  # chunks that training wrote hold all layers
            value = np.asarray(array.read().result())
            total = digest(value, shape)
            yield from value
        self._check(name, total)

    def __getitem__(self, name: str) -> np.ndarray:
        """A whole leaf."""
        value = np.asarray(self._open(name).read().result())
        self._check(name, digest(value, self.shapes[name]))
        return value

    def _check(self, name: str, total: int) -> None:
        name = self._ema.get(name, name)
        if total % 2**32 != self._digests[name]:
            raise CorruptCheckpoint(
                self.folder, f"{name} has digest {total % 2**32:08x}, expected {self._digests[name]:08x}"
            )

    def _open(self, name: str) -> Any:
        name = self._ema.get(name, name)
        item, leaf = _place(self.folder.resolve(), name)
        if (item / "manifest.ocdbt").exists():
            store = {"driver": "ocdbt", "base": f"file://{item}/", "path": f"{leaf}/"}
        else:
            store = {"driver": "file", "path": f"{item / leaf}/"}
        try:
            return ts.open({"driver": "zarr", "kvstore": store}, open=True, read=True).result()
        except ValueError as error:
            raise CorruptCheckpoint(self.folder, f"{name} cannot be opened ({error})") from error
