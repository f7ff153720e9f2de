"""Streams files of named tensors, one tensor at a time: `.safetensors` and PyTorch's `.bin` / `.pt`.

The libraries' own savers need every tensor of a file in memory at once, and the published Emu's file has 34 GB. Both
formats are simple enough to stream: a JSON header and the data behind it, or a zip with one pickle that describes the
tensors and a member with the data of each.
"""

from __future__ import annotations

import collections
import contextlib
import io
import json
import math
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from emu_jax.checkpoints import packed
from emu_jax.checkpoints.convert.tensor_files import import_torch
from emu_jax.storage import write_atomically

SAFETENSORS_NAMES = {dtype: name for name, dtype in packed.DTYPES.items()}
TORCH_STORAGES = {
    np.dtype(ml_dtypes.bfloat16): "BFloat16Storage",
    np.dtype(np.float16): "HalfStorage",
    np.dtype(np.float32): "FloatStorage",
    np.dtype(np.float64): "DoubleStorage",
}
ALIGNMENT = 64  # bytes; each tensor's data in PyTorch's files is aligned, so that they can be memory-mapped

Declared = Mapping[str, tuple[tuple[int, ...], np.dtype]]  # name -> shape, dtype


@contextlib.contextmanager
def tensor_writer(
    path: Path, declared: Declared, *, nest: str | None = None, metadata: Mapping[str, str] | None = None
) -> Iterator[Callable[[str, np.ndarray], None]]:
    """Yields `write(name, value)`, which writes the next declared tensor, cast to its declared dtype.

    Args:
      path: the file; its suffix selects the format.
      declared: every tensor that will be written, in their order.
      nest: PyTorch only: the name under which the state dict is nested.
      metadata: safetensors only: texts for the header.
    """
    waiting = collections.deque(declared)
    with contextlib.ExitStack() as context:
        partial = context.enter_context(write_atomically(path))
        if path.suffix == ".safetensors":
            file = _safetensors(partial, declared, metadata or {})
        else:
            file = _torch(partial, declared, nest)
        append = context.enter_context(file)

        def write(name: str, value: np.ndarray) -> None:
            expected = waiting.popleft()
            shape, dtype = declared[name]
            assert name == expected and value.shape == shape, f"{name} {value.shape}, expected {expected} {shape}"
            append(name, np.ascontiguousarray(value.astype(dtype, copy=False)))

        yield write
        assert not waiting, f"{path}: {len(waiting)} tensors were not written"


Append = Callable[[str, np.ndarray], object]


@contextlib.contextmanager
def _safetensors(path: Path, declared: Declared, metadata: Mapping[str, str]) -> Iterator[Append]:
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    offset = 0
    for name, (shape, dtype) in declared.items():
        size = math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": SAFETENSORS_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # data begins at a multiple of 8 bytes
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        yield lambda _, value: file.write(_bytes(value))


@contextlib.contextmanager
def _torch(path: Path, declared: Declared, nest: str | None) -> Iterator[Append]:
    keys = {name: str(number) for number, name in enumerate(declared)}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        description = {"data.pkl": _describe(declared, keys, nest), "byteorder": b"little", "version": b"3\n"}
        for name, content in description.items():
            # A ZipInfo of its own has no time of day: the same weights are the same bytes.
            archive.writestr(zipfile.ZipInfo(f"archive/{name}"), content)

        def append(name: str, value: np.ndarray) -> None:
            info = zipfile.ZipInfo(f"archive/data/{keys[name]}")
            # The local header takes 30 bytes, the name, 20 bytes of 64-bit sizes, and 4 of this padding's own header.
            assert archive.fp is not None  # it is open
            begins = archive.fp.tell() + 30 + len(info.filename) + 20 + 4
            info.extra = struct.pack("<HH", 0x4650, -begins % ALIGNMENT) + b"\0" * (-begins % ALIGNMENT)
            with archive.open(info, "w", force_zip64=True) as member:
                member.write(_bytes(value))

        yield append


def _bytes(value: np.ndarray) -> memoryview:
    return value.reshape(-1).view(np.uint8).data


def _describe(declared: Declared, keys: Mapping[str, str], nest: str | None) -> bytes:
    """The pickle of a PyTorch file: a dict of tensors that refer to storages by name."""
    torch = import_torch()

    class Storage:
        def __init__(self, name: str):
            shape, dtype = declared[name]
            kind = getattr(torch, TORCH_STORAGES[dtype])
            self.id = ("storage", kind, keys[name], "cpu", math.prod(shape))

    class Tensor:
        def __init__(self, name: str):
            self.name = name

        def __reduce__(self) -> tuple:
            shape, _ = declared[self.name]
            strides = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
            arguments: tuple[Any, ...] = (Storage(self.name), 0, shape, strides, False, collections.OrderedDict())
            return torch._utils._rebuild_tensor_v2, arguments

    class Pickler(pickle.Pickler):
        def persistent_id(self, thing: object) -> tuple | None:
            return thing.id if isinstance(thing, Storage) else None

    state: Any = {name: Tensor(name) for name in declared}
    stream = io.BytesIO()
    Pickler(stream, protocol=2).dump(state if nest is None else {nest: state})
    return stream.getvalue()
