"""Files of named tensors, read lazily: PyTorch `.bin`/`.pt`/`.pth` or `.safetensors` files in, NumPy arrays out.

Opening a file reads names, shapes and dtypes. A tensor's data is read when it is asked for, so that files larger than
memory can be read one tensor at a time. Pickles are read with `weights_only=True`, so that no code in them runs.
`ShardedTensors` is a folder of such files with an index; `Tensors` is the interface of both.
"""

from __future__ import annotations

import json
import math
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from emu_jax.errors import UserError

SUFFIXES = (".bin", ".pt", ".pth", ".safetensors")
INSTALL = "pip install emu-jax[convert]"
NESTS = ("module", "state_dict")  # names under which trainers nest the weights beside their own state
# Bytes read before a file is opened again: pages of a memory map count as the process's memory while it is open.
REOPEN = 1 << 28
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")  # of the shards in a folder
INDEX_LIMIT = 100 << 20  # bytes; the limit of safetensors for its headers

# The errors of torch.load on damaged files, found by flipping bytes and truncating files.
_DAMAGED = (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    struct.error,
    RuntimeError,
    ValueError,
    EOFError,
    OSError,
    LookupError,
    AssertionError,
    AttributeError,
    TypeError,
)
_FLOATING = {  # PyTorch's names and safetensors'
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
}


class Tensors(Mapping[str, np.ndarray]):
    """name -> array, in the files' own precision (bfloat16 as `ml_dtypes.bfloat16`).

    Attributes:
      path: the file or folder.
      files: every file of weights that is read.
      shapes: name -> shape of every tensor; known without reading data.
      dtypes: name -> NumPy dtype, or the file's name of a dtype that is not supported.
      others: name -> what is wrong with an entry that is not a readable tensor, such as a pickle's other objects.
      beside: names beside the top-level `module` or `state_dict` in which a trainer nested the weights.
    """

    path: Path
    files: tuple[Path, ...]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, np.dtype | str]
    others: dict[str, str]
    beside: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def nbytes(self, name: str) -> int:
        """Bytes of a tensor's data in the file."""
        return math.prod(self.shapes[name]) * np.dtype(self.dtypes[name]).itemsize


class TensorFile(Tensors):
    """The tensors of one file."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.files = (self.path,)
        if self.path.suffix not in SUFFIXES:
            raise UserError(f"{path}: not a known kind of weights file; expected {', '.join(SUFFIXES)}")
        if not self.path.is_file():
            raise UserError(f"{path}: no such file; expected a file of weights ({', '.join(SUFFIXES)})")
        self.others = {}
        self._open()

    def _open(self) -> None:
        self._unread = REOPEN
        if self.path.suffix == ".safetensors":
            self._open_safetensors()
        else:
            self._open_torch()

    def __getitem__(self, name: str) -> np.ndarray:
        if not isinstance(dtype := self.dtypes[name], np.dtype):
            raise UserError(f"{self.path}: {name} is {dtype}; expected a floating type of 16 to 64 bits")
        if self._unread < 0:
            self._open()
        self._unread -= self.nbytes(name)
        return self._read(name)

    def _open_torch(self) -> None:
        torch = import_torch()
        try:
            with warnings.catch_warnings():  # about odd pickle protocols; the errors below say more
                warnings.simplefilter("ignore", UserWarning)
                # PyTorch's format before 1.6 is not a zip file and cannot be memory-mapped.
                mmap = zipfile.is_zipfile(self.path)
                state = torch.load(self.path, map_location="cpu", weights_only=True, mmap=mmap)
        except _DAMAGED as error:
            raise UserError(f"{self.path}: {_why_refused(error)}; nothing was loaded") from error
        for nest in NESTS:
            if isinstance(state, Mapping) and isinstance(state.get(nest), Mapping):
                self.beside = tuple(str(name) for name in state if name != nest)
                state = state[nest]
        if not isinstance(state, Mapping):
            raise UserError(
                f"{self.path}: holds an object of type {type(state).__name__}; expected a state dict (names to tensors)"
            )
        tensors = {str(name): value for name, value in state.items() if torch.is_tensor(value)}
        self.others = {str(n): f"{type(v).__name__}, not a tensor" for n, v in state.items() if not torch.is_tensor(v)}
        self.shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        self.dtypes = {name: _torch_dtype(tensor) for name, tensor in tensors.items()}

        def read(name: str) -> np.ndarray:
            tensor = tensors[name].detach()
            if tensor.dtype == torch.bfloat16:  # NumPy lacks it: copy the bits
                return tensor.contiguous().view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
            return tensor.numpy()

        self._read = read

    def _open_safetensors(self) -> None:
        try:
            from safetensors import SafetensorError, safe_open
        except ImportError as error:
            raise UserError(f"{self.path}: reading it needs safetensors; run `{INSTALL}`") from error
        try:
            file = safe_open(self.path, framework="numpy")
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        except (SafetensorError, OSError) as error:
            reason = str(error).partition("\n")[0]
            raise UserError(
                f"{self.path}: damaged, or not a safetensors file ({reason}); nothing was loaded"
            ) from error
        self.shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
        words = {name: part.get_dtype() for name, part in slices.items()}
        self.dtypes = {name: _FLOATING.get(word, word) for name, word in words.items()}
        self._read = file.get_tensor


class ShardedTensors(Tensors):
    """The tensors of a folder of shards with an index such as `model.safetensors.index.json`."""

    def __init__(self, index: Path):
        self.path = index.parent
        shard_of = self._read_index(index)
        shards = {name: TensorFile(self.path / name) for name in sorted(set(shard_of.values()))}
        self.files = tuple(shard.path for shard in shards.values())
        self.shapes, self.dtypes, self.others, self._shard = {}, {}, {}, {}
        for file, shard in shards.items():
            for name in (*shard, *shard.others):
                if name in self.shapes or name in self.others:
                    self.others[name] = f"repeated in {file}"
                elif shard_of.get(name) != file:
                    self.others[name] = f"in {file}, which {index.name} does not say"
                elif name in shard.others:
                    self.others[name] = shard.others[name]
                else:
                    self.shapes[name], self.dtypes[name] = shard.shapes[name], shard.dtypes[name]
                    self._shard[name] = shard
        for name, file in shard_of.items():
            if name not in self.shapes and name not in self.others:
                self.others[name] = f"listed in {index.name}, absent from {file}"

    def _read_index(self, index: Path) -> dict[str, str]:
        try:
            if index.stat().st_size > INDEX_LIMIT:
                raise UserError(f"{index}: larger than {INDEX_LIMIT >> 20} MiB; expected an index of tensor names")
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            names = {str(key): str(name) for key, name in weight_map.items()}
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise UserError(f'{index}: expected {{"weight_map": {{name: file}}}} ({type(error).__name__})') from error
        for name in sorted(set(names.values())):
            if Path(name).name != name or not (self.path / name).is_file():
                raise UserError(f"{index}: lists {name}, which is no file in {self.path}; download the folder again")
        return names

    def __getitem__(self, name: str) -> np.ndarray:
        return self._shard[name][name]


def open_tensors(path: Path, names: tuple[str, ...]) -> Tensors | None:
    """The tensors of a folder: those of an index, or of the first of `names` that exists; None if there are none."""
    for index in INDEXES:
        if (path / index).is_file():
            return ShardedTensors(path / index)
    for name in names:
        if (path / name).is_file():
            return TensorFile(path / name)
    return None


def import_torch() -> Any:
    """The module torch; UserError with the extra to install if it is missing."""
    try:
        import torch
    except ImportError as error:
        raise UserError(f"reading .bin and .pt files needs PyTorch; run `{INSTALL}`") from error
    return torch


def _torch_dtype(tensor: Any) -> np.dtype | str:
    word = str(tensor.dtype).removeprefix("torch.")
    if str(tensor.layout) != "torch.strided":
        return f"{word} ({str(tensor.layout).removeprefix('torch.')})"
    return _FLOATING.get(word, word)


def _why_refused(error: Exception) -> str:
    # PyTorch's own message advises to read the file again with weights_only=False.
    if found := re.search(r"GLOBAL (\S+)", str(error)):
        return f"refused, because the pickle asks for {found[1]} and only plain tensors are read"
    return f"damaged, or not a PyTorch file of plain tensors ({type(error).__name__})"
