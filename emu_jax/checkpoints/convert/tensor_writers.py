"""Files of named tensors, written in order, a tensor at a time: `.safetensors` and PyTorch's `.bin` / `.pt`.

The libraries' own savers need every tensor of a file in memory at once. Both formats are simple enough to stream: a
JSON header and the data behind it; a zip of one pickle, which says what the tensors are, and a member for each one's
data. What is written gets its name when it is whole.
"""

from __future__ import annotations

import collections
import io
import json
import math
import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from emu_jax.checkpoints.convert.tensor_files import import_torch

SAFETENSORS_NAMES = {
    np.dtype(ml_dtypes.bfloat16): "BF16",
    np.dtype(np.float16): "F16",
    np.dtype(np.float32): "F32",
    np.dtype(np.float64): "F64",
}
TORCH_STORAGES = {
    np.dtype(ml_dtypes.bfloat16): "BFloat16Storage",
    np.dtype(np.float16): "HalfStorage",
    np.dtype(np.float32): "FloatStorage",
    np.dtype(np.float64): "DoubleStorage",
}
ALIGNMENT = 64  # bytes, of each tensor's data in PyTorch's files, so that they can be memory-mapped

Declared = Mapping[str, tuple[tuple[int, ...], np.dtype]]  # name -> shape, dtype


class TensorWriter:
    """Writes the tensors that were declared, in their order; use it in a `with` block.

    Args:
      path: the file; its suffix tells the format.
      declared: every tensor that will be written.
      nest: PyTorch alone: the name under which the tensors stand.
    """

    def __init__(self, path: Path, declared: Declared, *, nest: str | None = None):
        self.path, self._declared, self._waiting = path, dict(declared), collections.deque(declared)
        self._partial = path.with_name(path.name + ".partial")
        if path.suffix == ".safetensors":
            self._open_safetensors()
        else:
            self._open_torch(nest)

    def __enter__(self) -> TensorWriter:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        self._close()
        if kind is None:
            assert not self._waiting, f"{self.path}: {len(self._waiting)} tensors were not written"
            os.replace(self._partial, self.path)
        else:
            self._partial.unlink(missing_ok=True)

    def write(self, name: str, value: np.ndarray) -> None:
        """Writes the next tensor, cast to its declared dtype."""
        expected = self._waiting.popleft()
        shape, dtype = self._declared[name]
        assert name == expected and value.shape == shape, f"{name} {value.shape}, expected {expected} {shape}"
        self._append(name, np.ascontiguousarray(value.astype(dtype, copy=False)))

    def _open_safetensors(self) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, (shape, dtype) in self._declared.items():
            size = math.prod(shape) * dtype.itemsize
            header[name] = {
                "dtype": SAFETENSORS_NAMES[dtype],
                "shape": list(shape),
                "data_offsets": [offset, offset + size],
            }
            offset += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # data begins at a multiple of 8 bytes
        file = self._partial.open("wb")
        file.write(struct.pack("<Q", len(text)) + text)
        self._append: Callable[[str, np.ndarray], object] = lambda _, value: file.write(_bytes(value))
        self._close = file.close

    def _open_torch(self, nest: str | None) -> None:
        archive = zipfile.ZipFile(self._partial, "w", zipfile.ZIP_STORED)
        keys = {name: str(number) for number, name in enumerate(self._declared)}
        archive.writestr("archive/data.pkl", _describe(self._declared, keys, nest))
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/version", "3\n")

        def append(name: str, value: np.ndarray) -> None:
            info = zipfile.ZipInfo(f"archive/data/{keys[name]}")
            # Local header: 30 bytes, the name, 20 bytes of 64-bit sizes, and 4 of this padding's own header.
            assert archive.fp is not None  # it is open
            begins = archive.fp.tell() + 30 + len(info.filename) + 20 + 4
            info.extra = struct.pack("<HH", 0x4650, -begins % ALIGNMENT) + b"\0" * (-begins % ALIGNMENT)
            with archive.open(info, "w", force_zip64=True) as member:
                member.write(_bytes(value))

        self._append, self._close = append, archive.close


def _bytes(value: np.ndarray) -> memoryview:
    return value.reshape(-1).view(np.uint8).data


def _describe(declared: Declared, keys: Mapping[str, str], nest: str | None) -> bytes:
    """The pickle of a PyTorch file: a dict of tensors whose storages are named and lie elsewhere."""
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
