"""Checkpoints of weights alone, written and read a slice at a time, whatever their size.

    folder/ <item>/<leaf>/ chunks   params, and lora, unused where there are any: what Orbax restores, sharded or whole
            meta                    as a training checkpoint's (checkpoints/store.py), with a digest of every leaf

Arrays are Zarr, one chunk or more a layer, so that each host of a mesh reads little more than its own part. A folder
in the making is called `<folder>.partial`; it can be gone on with, and gets its name when everything is in it.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import tensorstore as ts

from emu_jax.errors import UserError

CHUNK = 32 << 20  # bytes, at most
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
    """A slice's share of its leaf's digest; the shares of all slices add up to it, modulo 2^32.

    The digest is that of `checkpoints/store.py`: the sum of word * multiplier, where multipliers grow linearly along
    every axis. So sums along the other axes are all that is needed, and no array of multipliers.
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
    if unsigned is None:  # 8 bytes: two words an element, as an axis of its own
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
    """The item's folder, and the leaf's name in it as Orbax spells it."""
    item, _, path = name.partition("/")
    return folder / item, path.replace("/", ".")


class LeafWriter:
    """Writes a folder of leaves.

    Args:
      folder: it must not exist; `<folder>.partial` may, and is gone on with when it was begun by the same `job`.
      leaves: everything that will be in it; stacked: those of which a layer is written at a time.
      job: a fingerprint of what is being written, from which sources.
    """

    def __init__(self, folder: Path, leaves: Leaves, stacked: Collection[str], job: str):
        if folder.exists():
            raise UserError(f"--to {folder}: it exists; name a new folder, or remove it")
        self.folder, self.partial = folder, folder.with_name(folder.name + ".partial")
        self.leaves, self._stacked = dict(leaves), set(stacked)
        self._arrays: dict[str, Any] = {}
        self.digests = dict.fromkeys(self.leaves, 0)
        self.done: set[int] = set()
        progress = self.partial / PROGRESS
        if not self._resume(progress, job):
            shutil.rmtree(self.partial, ignore_errors=True)
            try:
                self.partial.mkdir(parents=True)
                progress.write_text(json.dumps({"job": job}) + "\n", encoding="utf-8")
            except OSError as error:
                raise UserError(f"--to {folder}: cannot be written ({error.strerror})") from error
        self._progress = progress.open("a", encoding="utf-8")

    def _resume(self, progress: Path, job: str) -> bool:
        """Reads what an earlier run has written; False where there is nothing to go on with."""
        if not progress.is_file():
            return False
        lines = progress.read_text(encoding="utf-8").split("\n")[:-1]  # an unfinished last line is lost work
        if not lines or json.loads(lines[0]) != {"job": job}:
            return False
        for line in lines[1:]:
            record = json.loads(line)
            self.done.add(record["step"])
            for leaf, share in record["digests"].items():
                self.digests[leaf] = (self.digests[leaf] + share) % 2**32
        with progress.open("r+b") as file:  # what is appended must not go on an unfinished line
            file.truncate(sum(len(line.encode()) + 1 for line in lines))
        return True

    def write(self, step: int, layer: int | None, values: Mapping[str, np.ndarray]) -> None:
        """Writes one slice of each of some leaves; on disk when this returns."""
        shares = {}
        for name, value in values.items():
            shape, dtype = self.leaves[name]
            array = self._arrays.get(name)
            if array is None:
                array = self._arrays[name] = self._create(name, shape, dtype)
            value = value.astype(dtype, copy=False)
            shares[name] = digest(value, shape, layer)
            (array if layer is None else array[layer]).write(value).result()
        self._progress.write(json.dumps({"step": step, "digests": shares}) + "\n")
        self._progress.flush()
        self.done.add(step)
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
                "compressor": None,  # weights hardly shrink, and slow down a lot
                "dimension_separator": ".",
            },
        }
        return ts.open(spec, open=True, create=True).result()

    def finish(self, meta: Mapping[str, Any], beside: Mapping[str, Path]) -> None:
        """Adds the metadata, moves the folders `beside` in, and gives the folder its name."""
        self._progress.close()
        by_item: dict[str, dict[str, tuple[int, ...]]] = {}
        for name, (shape, _) in self.leaves.items():
            item, _, path = name.partition("/")
            by_item.setdefault(item, {})[path] = shape
        for item, shapes in by_item.items():
            (self.partial / item / "_METADATA").write_text(json.dumps(_orbax_metadata(shapes)), encoding="utf-8")
        described = {name: [list(shape), dtype.name] for name, (shape, dtype) in self.leaves.items()}
        (self.partial / "meta").mkdir(exist_ok=True)
        text = json.dumps({**meta, "leaves": described, "digests": self.digests})
        (self.partial / "meta" / "metadata").write_text(text, encoding="utf-8")
        for name, origin in beside.items():
            shutil.rmtree(self.partial / name, ignore_errors=True)  # a run killed right here has moved it before
            os.replace(origin, self.partial / name)
        (self.partial / PROGRESS).unlink()
        os.replace(self.partial, self.folder)

    def discard(self) -> None:
        """Removes everything that was written."""
        self._progress.close()
        shutil.rmtree(self.partial, ignore_errors=True)


def _orbax_metadata(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """What Orbax reads to know an item's tree."""
    tree = {}
    for path, shape in shapes.items():
        keys = tuple(path.split("/"))
        tree[str(keys)] = {
            "key_metadata": [{"key": key, "key_type": 2} for key in keys],
            "value_metadata": {"value_type": "jax.Array", "skip_deserialize": False, "write_shape": list(shape)},
        }
    return {"tree_metadata": tree, "use_ocdbt": False, "use_zarr3": False, "custom_metadata": None}


class LeafReader:
    """Reads leaves of any checkpoint, slice by slice where its chunks allow it, and checks their digests.

    Args:
      folder: a checkpoint; meta: its metadata (`checkpoint.read_meta`).
      instead: leaves that are read in place of others, by the others' names (`checkpoint.averaged_leaves`); their dtype
        may be another than `dtypes` says.
    """

    def __init__(self, folder: Path, meta: Mapping[str, Any], instead: Mapping[str, str] | None = None):
        self.folder = folder
        self.shapes = {name: tuple(shape) for name, (shape, _) in meta["leaves"].items()}
        self.dtypes = {name: np.dtype(word) for name, (_, word) in meta["leaves"].items()}
        self._digests = meta["digests"]
        self._instead = instead or {}

    def slices(self, name: str) -> Iterable[np.ndarray]:
        """A leaf's layers in order; raises UserError where their digest is not the one that was written."""
        array, shape = self._open(name), self.shapes[name]
        total = 0
        if array.chunk_layout.read_chunk.shape[0] == 1:
            for layer in range(shape[0]):
                value = np.asarray(array[layer].read().result())
                total += digest(value, shape, layer)
                yield value
        else:  # training's chunks hold all layers
            value = np.asarray(array.read().result())
            total = digest(value, shape)
            yield from value
        self._check(name, total)

    def __getitem__(self, name: str) -> np.ndarray:
        value = np.asarray(self._open(name).read().result())
        self._check(name, digest(value, self.shapes[name]))
        return value

    def _check(self, name: str, total: int) -> None:
        name = self._instead.get(name, name)
        if total % 2**32 != self._digests[name]:
            raise UserError(
                f"{self.folder}: the checkpoint is corrupt: {name} has digest {total % 2**32:08x}, expected "
                f"{self._digests[name]:08x}; use another checkpoint, or convert again"
            )

    def _open(self, name: str) -> Any:
        name = self._instead.get(name, name)
        item, leaf = _place(self.folder.resolve(), name)
        if (item / "manifest.ocdbt").exists():
            store = {"driver": "ocdbt", "base": f"file://{item}/", "path": f"{leaf}/"}
        else:
            store = {"driver": "file", "path": f"{item / leaf}/"}
        try:
            return ts.open({"driver": "zarr", "kvstore": store}, open=True, read=True).result()
        except ValueError as error:
            raise UserError(f"{self.folder}: the checkpoint is corrupt: {name} cannot be opened ({error})") from error
