"""Checkpoints without an optimizer, written and read one slice at a time, whatever their size.

    folder/ <item>/<leaf>/ objects   params, and lora and unused if there are any (checkpoints/arrays.py)
            <item>/_METADATA         the item's tree in Orbax's form
            meta                     like a training checkpoint's (checkpoints/store.py), with a digest of every leaf

`meta` is written last: a folder without it is not complete. Writing it can be resumed.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from emu_jax.checkpoints import arrays
from emu_jax.checkpoints.digests import digest
from emu_jax.checkpoints.store import CorruptCheckpoint, seal_meta
from emu_jax.errors import UserError
from emu_jax.storage import Path, is_bucket, partial_path, remove, replace_text

JOB = "job.txt"  # in an unfinished folder: what is being written there
PROGRESS = "progress.json"  # in an unfinished checkpoint: which slices are written
RECORD_S = 2.0  # seconds between records of progress; a bucket takes one write a second of the same name
METADATA = "meta/metadata"

Leaves = Mapping[str, tuple[tuple[int, ...], np.dtype]]  # name, such as params/ln_visual/scale -> shape, dtype
Axes = Mapping[str, tuple[str | None, ...]]  # name -> the logical axes that divide it into chunks


# ------------------------------------------------------------------------------------------------------- folders


def check_new(folder: Path) -> None:
    """Raises UserError if the folder exists, unless it is one in a bucket that `resumable_folder` has not finished."""
    if folder.exists() and not (is_bucket(folder) and (folder / JOB).is_file()):
        raise UserError(f"{folder}: it exists; name a new folder, or remove it")


@contextlib.contextmanager
def resumable_folder(folder: Path, job: str) -> Iterator[Path]:
    """Yields where to write a new folder, with what an interrupted run of the same job wrote there.

    On local disks that is `<folder>.partial`, which is renamed when the block succeeds. Buckets cannot rename: there it
    is the folder itself, whose checkpoints count once they are complete. After an error nothing is left behind, but
    after a kill or a TransientError the next run resumes.

    Args:
      job: a fingerprint of everything that will be written.

    Raises:
      UserError: the folder exists, or cannot be written. TransientError: its bucket cannot be reached.
    """
    place = folder if is_bucket(folder) else partial_path(folder)
    marker = place / JOB
    check_new(folder)
    try:
        if not (marker.is_file() and marker.read_text(encoding="utf-8") == job):
            remove(place)
            place.mkdir(parents=True, exist_ok=True)
            replace_text(marker, job)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror or error})") from error
    try:
        yield place
    except UserError:
        remove(place)
        raise
    except (OSError, ValueError) as error:  # TensorStore raises ValueError if a file cannot be written
        if passing := arrays.transient(folder, error):
            raise passing from error
        remove(place)
        reason = str(error).partition("\n")[0][:300]
        raise UserError(f"{folder}: cannot be written ({reason}); nothing was left there") from error
    marker.unlink()
    if place != folder:
        place.rename(folder)


# ------------------------------------------------------------------------------------------------------- writing


class LeafWriter:
    """Writes a checkpoint; what an interrupted run of the same job wrote to `folder` is kept.

    Attributes:
      complete: whether the checkpoint is there already, whole.
      done: numbers of the writes that an earlier run has made.

    Args:
      leaves, axes: everything that will be written; leaves without axes are not divided for any mesh.
    """

    def __init__(self, folder: Path, leaves: Leaves, axes: Axes):
        self.folder = folder
        self.leaves, self._axes = dict(leaves), axes
        self._arrays: dict[str, Any] = {}
        self.digests = dict.fromkeys(self.leaves, 0)
        self.done: set[int] = set()
        self.complete = (folder / METADATA).is_file()
        self._recorded = time.monotonic()
        if self.complete:
            remove(folder / PROGRESS)  # a kill came between the last two lines of `finish`
        if (folder / PROGRESS).is_file():
            record = json.loads((folder / PROGRESS).read_text(encoding="utf-8"))
            self.done, self.digests = set(record["done"]), record["digests"]

    def write(self, number: int, layer: int | None, values: Mapping[str, np.ndarray]) -> None:
        """Writes one layer (None: all) of each of the leaves in `values`; it is stored when this returns.

        Args:
          number: identifies the write; a resumed job skips those in `done`.
        """
        shares = {}
        for name, value in values.items():
            shape, dtype = self.leaves[name]
            if name not in self._arrays:
                axes = self._axes.get(name, (None,) * len(shape))
                self._arrays[name] = arrays.create(self.folder, name, shape, dtype, axes)
            array = self._arrays[name]
            value = value.astype(dtype, copy=False)
            shares[name] = digest(value, shape, layer)
            (array if layer is None else array[layer]).write(value).result()
        self.done.add(number)
        for name, share in shares.items():
            self.digests[name] = (self.digests[name] + share) % 2**32
        if time.monotonic() - self._recorded >= RECORD_S:
            self.record()

    def record(self) -> None:
        """Records the writes so far, from which the next run resumes."""
        self.folder.mkdir(parents=True, exist_ok=True)
        replace_text(self.folder / PROGRESS, json.dumps({"done": sorted(self.done), "digests": self.digests}))
        self._recorded = time.monotonic()

    def finish(self, holds: str, meta: Mapping[str, Any]) -> None:
        """Completes the checkpoint by its metadata.

        Args:
          holds: what the parameters are. meta: the rest of the metadata, without leaves and digests.
        """
        by_item: dict[str, dict[str, tuple[int, ...]]] = {}
        for name, (shape, _) in self.leaves.items():
            item, _, path = name.partition("/")
            by_item.setdefault(item, {})[path] = shape
        for item, shapes in by_item.items():
            replace_text(self.folder / item / arrays.ITEM_FILE, json.dumps(arrays.describe_item(shapes)))
        described = {name: [list(shape), dtype.name] for name, (shape, dtype) in self.leaves.items()}
        text = json.dumps(seal_meta({"holds": holds, **meta, "leaves": described, "digests": self.digests}))
        (self.folder / METADATA).parent.mkdir(exist_ok=True)
        replace_text(self.folder / METADATA, text)
        remove(self.folder / PROGRESS)


# ------------------------------------------------------------------------------------------------------- reading


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
        self._stored = arrays.StoredArrays(folder)
        self._digests = meta["digests"]
        self._ema = ema or {}

    def slices(self, name: str) -> Iterable[np.ndarray]:
        """A leaf's layers in order; raises UserError at the end if their digest is not the one that was written."""
        array, shape = self._open(name), self.shapes[name]
        total = 0
        if array.chunk_layout.read_chunk.shape[0] == 1:
            for layer in range(shape[0]):
                value = self._read(array[layer])
                total += digest(value, shape, layer)
                yield value
        else:  # chunks that training wrote hold all layers
            value = self._read(array)
            total = digest(value, shape)
            yield from value
        self._check(name, total)

    def __getitem__(self, name: str) -> np.ndarray:
        """A whole leaf."""
        value = self._read(self._open(name))
        self._check(name, digest(value, self.shapes[name]))
        return value

    def _check(self, name: str, total: int) -> None:
        name = self._ema.get(name, name)
        if total % 2**32 != self._digests[name]:
            raise CorruptCheckpoint(
                self.folder, f"{name} has digest {total % 2**32:08x}, expected {self._digests[name]:08x}"
            )

    def _open(self, name: str) -> Any:
        with arrays.errors_of(self.folder):
            return self._stored.open(self._ema.get(name, name)).result()

    def _read(self, array: Any) -> np.ndarray:
        with arrays.errors_of(self.folder):
            return np.asarray(array.read().result())
