"""A checkpoint in one file, to be sent or shipped: safetensors with the checkpoint's metadata in the header.

    folder/ emu_jax.safetensors           `emu-jax export --format packed` writes it
            unet/ vae/ chat/              a folder each, with a file of the same name

Leaves have the names of the checkpoint. They are stored in one dtype, and are loaded in the dtype that the metadata
name. A file may leave out leaves that another file, its *base*, holds: a tuned model shares all but its adapters with
the model that it was tuned from.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from emu_jax.storage import Path

FILE = "emu_jax.safetensors"
META = "emu_jax"  # key of the metadata in the header's `__metadata__`
BASE = "base"  # key of the base's path, from the folder of the file
LIMIT = 100 << 20  # bytes of a header, in safetensors' own reader
DTYPES = {  # by their names in safetensors
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I8": np.dtype(np.int8),
    "I32": np.dtype(np.int32),
}


def is_packed(folder: Path) -> bool:
    """Whether a folder holds a packed checkpoint."""
    return (folder / FILE).is_file()


def read_meta(folder: Path) -> Any:
    """The sealed metadata of a packed checkpoint (`store.seal_meta`).

    Raises:
      ValueError: the file is damaged, or is not one of ours.
    """
    with (folder / FILE).open("rb") as file:
        header = _read_header(file)
    return json.loads(header.get("__metadata__", {}).get(META, "null"))


def _read_header(file: Any) -> dict[str, Any]:
    """Reads the header of an open file, up to where the data begin."""
    start = file.read(8)
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else LIMIT + 1
    if length > LIMIT:
        raise ValueError("it is not a safetensors file")
    header = json.loads(file.read(length))
    if not isinstance(header, dict) or not isinstance(header.get("__metadata__", {}), dict):
        raise ValueError("its header is no JSON object")
    return header


class PackedArrays(Mapping[str, np.ndarray]):
    """The leaves of a packed checkpoint and of its base, by name, in the dtypes of the files. Reads each file once.

    Raises:
      ValueError: a file is damaged. KeyError: a leaf is absent.
    """

    def __init__(self, folder: Path):
        with (folder / FILE).open("rb") as file:
            header = _read_header(file)
            self._data = memoryview(file.read())
        described = header.pop("__metadata__", {})
        self._leaves: dict[str, Any] = header
        self._base = PackedArrays(folder / described[BASE]) if described.get(BASE) else {}

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._leaves:
            if name in self._base:
                return self._base[name]
            raise KeyError(f"{name} is not in {FILE}")
        leaf = self._leaves[name]
        start, stop = leaf["data_offsets"]
        part = self._data[start:stop]
        if len(part) != stop - start:
            raise ValueError(f"{FILE} is cut short")
        return np.frombuffer(part, DTYPES[leaf["dtype"]]).reshape(leaf["shape"])

    def __iter__(self):
        return iter({**self._base, **self._leaves})

    def __len__(self) -> int:
        return len({*self._base, *self._leaves})
