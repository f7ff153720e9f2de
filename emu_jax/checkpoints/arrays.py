"""How a leaf is stored: its chunks, and the TensorStore specification of its array.

Arrays are Zarr 3 with sharding: an *object* of at most 32 MiB is what a disk or bucket holds, and it is made of many
small *chunks*, each of which is read on its own by a range of bytes. Chunks follow the logical axes of the leaf, along
which a mesh shards it, so that a host reads little more than its own part, whatever the mesh.

    kernel [L, D, F] ("layers", "embed", "mlp"):  chunk [1, D/256, F/8],  object [1, as many chunks as fit]
"""

from __future__ import annotations

import collections
import contextlib
import functools
import json
import math
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import ml_dtypes
import numpy as np
import tensorstore as ts

from emu_jax import buckets
from emu_jax.checkpoints import packed
from emu_jax.checkpoints.store import unreadable
from emu_jax.errors import TransientError, UserError
from emu_jax.sharding import LOGICAL_AXIS_RULES
from emu_jax.storage import Path, absolute, is_bucket

OBJECT = 32 << 20  # maximum size of an object, in bytes
CHUNK = 32 << 10  # chunks are not divided below this size, in bytes
# Mesh axis -> the number of devices along it up to which a chunk belongs to one device. FSDP comes first: it has the
# most devices, and its hosts each read over the network.
DEVICES = {"fsdp": 256, "tensor": 8}
AHEAD = 1 << 30  # bytes that are read beyond the leaf that is being placed on the devices
ITEM_FILE = "_METADATA"
DTYPES = {
    np.dtype(ml_dtypes.bfloat16): "bfloat16",
    np.dtype(np.float16): "float16",
    np.dtype(np.float32): "float32",
    np.dtype(np.float64): "float64",
    np.dtype(np.int8): "int8",
    np.dtype(ml_dtypes.int4): "int4",
}

Index = tuple[tuple[int, int], ...]  # a part of an array: start and stop along every axis


# -------------------------------------------------------------------------------------------------------- chunks


def chunk_shapes(shape: Sequence[int], itemsize: int, axes: Sequence[str | None]) -> tuple[list[int], list[int]]:
    """The shapes of a leaf's objects and of the chunks in them.

    Args:
      itemsize: bytes of an element.
      axes: the leaf's logical axes, or None for those that no mesh shards.

    >>> chunk_shapes((40, 5120, 13824), 4, ("layers", "embed", "mlp"))
    ([1, 320, 13824], [1, 20, 1728])
    >>> chunk_shapes((40, 1408), 4, ("layers", "norm"))
    ([1, 1408], [1, 1408])
    """
    chunk = [1 if name == "layers" else max(size, 1) for name, size in zip(axes, shape, strict=True)]
    for mesh_axis, devices in DEVICES.items():
        for axis, name in enumerate(axes):
            if LOGICAL_AXIS_RULES[name] == mesh_axis:
                pieces = math.gcd(chunk[axis], devices)
                while pieces > 1 and math.prod(chunk) // pieces * itemsize < CHUNK:
                    pieces //= 2
                chunk[axis] //= pieces
    while math.prod(chunk) * itemsize > OBJECT:  # a leaf without logical axes
        longest = chunk.index(max(chunk))
        chunk[longest] = -(-chunk[longest] // 2)
    layer = [1 if name == "layers" else size for name, size in zip(axes, shape, strict=True)]
    counts = [-(-max(size, 1) // piece) for size, piece in zip(layer, chunk, strict=True)]
    while math.prod(chunk) * math.prod(counts) * itemsize > OBJECT:
        longest = counts.index(max(counts))
        counts[longest] = -(-counts[longest] // 2)
    return [count * piece for count, piece in zip(counts, chunk, strict=True)], chunk


# ----------------------------------------------------------------------------------------------- on disk or bucket


def create(folder: Path, name: str, shape: Sequence[int], dtype: np.dtype, axes: Sequence[str | None]) -> Any:
    """A leaf's new array in a checkpoint, or the one that an interrupted run of the same job began.

    Args:
      folder: the checkpoint. name: the leaf, such as `params/ln_visual/scale`.
    """
    item, leaf = place(folder, name)
    stored, chunk = chunk_shapes(shape, dtype.itemsize, axes)
    little_endian = {"name": "bytes", "configuration": {"endian": "little"}}
    # Weights hardly shrink, so they are not compressed. The index of an object has a checksum; the data have digests.
    sharding = {"chunk_shape": chunk, "codecs": [little_endian], "index_codecs": [little_endian, {"name": "crc32c"}]}
    spec = {
        "driver": "zarr3",
        "kvstore": _kvstore(item / leaf),
        "metadata": {
            "shape": list(shape),
            "data_type": DTYPES[dtype],
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": stored}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        },
    }
    return ts.open(spec, open=True, create=True).result()


def place(folder: Path, name: str) -> tuple[Path, str]:
    """The folder of a leaf's item, and the leaf's name in it in Orbax's spelling."""
    item, _, path = name.partition("/")
    return folder / item, path.replace("/", ".")


def describe_item(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """An item's tree in Orbax's form, with arrays as `create` makes them."""
    tree = {}
    for path, shape in shapes.items():
        keys = tuple(path.split("/"))
        tree[str(keys)] = {
            "key_metadata": [{"key": key, "key_type": 2} for key in keys],
            "value_metadata": {"value_type": "jax.Array", "skip_deserialize": False, "write_shape": list(shape)},
        }
    return {"tree_metadata": tree, "use_ocdbt": False, "use_zarr3": True, "custom_metadata": None}


class StoredArrays:
    """The arrays of a checkpoint, ours, Orbax's or packed, by the names of their leaves."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._items: dict[Path, dict[str, Any]] = {}

    @functools.cached_property
    def _packed(self) -> packed.PackedArrays | None:
        return packed.PackedArrays(self._folder) if packed.is_packed(self._folder) else None

    def open(self, name: str) -> Any:
        """A future of the leaf's array, to be read."""
        if self._packed is not None:
            promise: Any
            future: Any
            promise, future = ts.Promise.new()
            promise.set_result(ts.array(self._packed[name]))
            return future
        item, leaf = place(self._folder, name)
        if item not in self._items:
            self._items[item] = json.loads((item / ITEM_FILE).read_text(encoding="utf-8"))
        described = self._items[item]
        store = _kvstore(item / leaf)
        if described["use_ocdbt"]:  # training checkpoints: all arrays of an item in one store
            store = {"driver": "ocdbt", "base": _kvstore(item), "path": f"{leaf}/"}
        spec = {"driver": "zarr3" if described["use_zarr3"] else "zarr", "kvstore": store}
        return ts.open(spec, open=True, read=True)


def _kvstore(folder: Path) -> dict[str, Any]:
    """TensorStore's store of a folder. It retries requests to a bucket as long as `buckets` does."""
    if not is_bucket(folder):
        return {"driver": "file", "path": f"{absolute(folder)}/"}
    scheme, _, rest = str(folder).partition("://")
    bucket, _, path = rest.partition("/")
    tries, waited = 0, 0.0
    while waited < buckets.timeout():
        waited += min(buckets.FIRST_PAUSE * 2**tries, buckets.LONGEST_PAUSE)
        tries += 1
    pauses = {"initial_delay": f"{buckets.FIRST_PAUSE}s", "max_delay": f"{buckets.LONGEST_PAUSE}s"}
    retries = {"max_retries": max(1, tries), **pauses}
    if scheme == "gs":
        return {"driver": "gcs", "bucket": bucket, "path": f"{path}/", "gcs_request_retries": retries}
    store = {"driver": "s3", "bucket": bucket, "path": f"{path}/", "s3_request_retries": retries}
    # As s3fs reads the environment.
    for field, variable in (("endpoint", "AWS_ENDPOINT_URL"), ("aws_region", "AWS_DEFAULT_REGION")):
        if variable in os.environ:
            store[field] = os.environ[variable]
    return store


@contextlib.contextmanager
def errors_of(folder: Path) -> Iterator[None]:
    """Raises what reading a checkpoint's arrays may raise as errors for the user.

    Raises:
      TransientError: its bucket cannot be reached. UserError: it is damaged.
    """
    try:
        yield
    except UserError:
        raise
    except (ValueError, KeyError, OSError) as error:
        shown = transient(folder, error) or unreadable(folder, error)
        if shown is error:
            raise
        raise shown from error


def transient(folder: Path, error: Exception) -> TransientError | None:
    """The error to show if the folder is in a bucket that cannot be reached."""
    if not (is_bucket(folder) and buckets.is_transient(error)):
        return None
    reason = str(error).partition("\n")[0].partition(" [tensorstore_spec")[0][:300]
    return TransientError(f"{folder}: storage does not answer ({reason}); start the command again")


# ----------------------------------------------------------------------------------------------- onto the devices


def read(stored: StoredArrays, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Reads leaves with their shardings; this process reads the parts of its own devices, each of them once.

    Raises:
      ValueError: an array is absent, damaged or of another shape; TensorStore's message says what is wrong.
    """
    opened = {name: stored.open(name) for name in wanted}  # all at once: each takes a round trip to a bucket
    values: dict[str, jax.Array] = {}
    reading: collections.deque[tuple[str, dict[Index, Index], dict[Index, Any]]] = collections.deque()
    ahead = 0  # bytes that are being read

    def finish() -> int:
        name, region_of, data = reading.popleft()
        leaf = wanted[name]

        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            key = _key(index, leaf.shape)
            region = region_of[key]
            inside = (slice(start - first, stop - first) for (start, stop), (first, _) in zip(key, region, strict=True))
            return data[region].result()[tuple(inside)]

        values[name] = jax.make_array_from_callback(leaf.shape, leaf.sharding, part)
        return sum(map(_size, data)) * leaf.dtype.itemsize

    for name, leaf in wanted.items():
        array = opened.pop(name).result()
        if array.shape != leaf.shape or array.dtype.numpy_dtype != leaf.dtype:
            raise ValueError(f"{name} is {array.dtype.name}{list(array.shape)}, its metadata say otherwise")
        indices = leaf.sharding.addressable_devices_indices_map(leaf.shape).values()
        region_of = regions({_key(index, leaf.shape) for index in indices})
        data = {region: array[tuple(slice(*ends) for ends in region)].read() for region in set(region_of.values())}
        reading.append((name, region_of, data))
        ahead += sum(map(_size, data)) * leaf.dtype.itemsize
        while ahead > AHEAD and len(reading) > 1:
            ahead -= finish()
    while reading:
        finish()
    return values


def regions(parts: Collection[Index]) -> dict[Index, Index]:
    """Part -> the region that is read for it: all parts together where they fill a region, which takes few requests.

    >>> regions([((0, 2), (0, 4)), ((0, 2), (4, 8))])
    {((0, 2), (0, 4)): ((0, 2), (0, 8)), ((0, 2), (4, 8)): ((0, 2), (0, 8))}
    >>> regions([((0, 2),), ((4, 6),)])
    {((0, 2),): ((0, 2),), ((4, 6),): ((4, 6),)}
    """
    ends = [list(zip(*along, strict=True)) for along in zip(*parts, strict=True)]
    box = tuple((min(starts), max(stops)) for starts, stops in ends)
    filled = _size(box) == sum(map(_size, parts))
    return {part: box if filled else part for part in parts}


def _key(index: tuple[slice, ...], shape: tuple[int, ...]) -> Index:
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))


def _size(region: Index) -> int:
    return math.prod(stop - start for start, stop in region)
