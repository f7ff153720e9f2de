"""Files of named tensors, read lazily: a PyTorch `.bin`/`.pt` or a `.safetensors` file in, NumPy arrays out.

Opening a file reads names, shapes and dtypes; a tensor's data is read when it is asked for, one at a time, so
that a file larger than memory can be walked through. Pickles are read with `weights_only=True`: nothing in
them runs.
"""

from __future__ import annotations

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

SUFFIXES = (".bin", ".pt", ".safetensors")
INSTALL = "pip install emu-jax[convert]"

# What torch.load raises on damaged files; found by flipping bytes and cutting ends off.
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
_FLOATING = {  # as PyTorch and as safetensors name it
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
}


class TensorFile(Mapping[str, np.ndarray]):
    """name -> array, in the file's own precision (bfloat16 as `ml_dtypes.bfloat16`).

    Attributes:
      path: the file.
      shapes: name -> shape of every tensor; known without reading the data.
      dtypes: name -> NumPy dtype, or the file's word for it when it is no floating type we read.
      others: name -> type of what a pickle holds among its tensors and is none.
      beside: names beside a top-level `module`, under which training frameworks nest the weights.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if self.path.suffix not in SUFFIXES:
            raise UserError(f"{path}: not a known kind of weights file; expected {', '.join(SUFFIXES)}")
        if not self.path.is_file():
            raise UserError(f"{path}: no such file; expected a file of weights ({', '.join(SUFFIXES)})")
        self.others: dict[str, str] = {}
        self.beside: tuple[str, ...] = ()
        if self.path.suffix == ".safetensors":
            self._open_safetensors()
        else:
            self._open_torch()

    def __getitem__(self, name: str) -> np.ndarray:
        if not isinstance(dtype := self.dtypes[name], np.dtype):
            raise UserError(f"{self.path}: {name} is {dtype}; expected a floating type of 16 to 64 bits")
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def _open_torch(self) -> None:
        torch = _import_torch()
        try:
            with warnings.catch_warnings():  # of an odd pickle protocol; the errors below say more
                warnings.simplefilter("ignore", UserWarning)
                # PyTorch's format before 1.6 is no zip file and cannot be memory-mapped.
                mmap = zipfile.is_zipfile(self.path)
                state = torch.load(self.path, map_location="cpu", weights_only=True, mmap=mmap)
        except _DAMAGED as error:
            raise UserError(f"{self.path}: {_why_refused(error)}; nothing was loaded") from error
        if isinstance(state, Mapping) and isinstance(state.get("module"), Mapping):
            self.beside = tuple(str(name) for name in state if name != "module")
            state = state["module"]
        if not isinstance(state, Mapping):
            raise UserError(
                f"{self.path}: holds an object of type {type(state).__name__}; expected a state dict (names to tensors)"
            )
        tensors = {str(name): value for name, value in state.items() if torch.is_tensor(value)}
        self.others = {str(n): type(v).__name__ for n, v in state.items() if not torch.is_tensor(v)}
        self.shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        self.dtypes = {name: _torch_dtype(tensor) for name, tensor in tensors.items()}

        def read(name: str) -> np.ndarray:
            tensor = tensors[name].detach()
            if tensor.dtype == torch.bfloat16:  # NumPy has none: carry the bits over
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


def _import_torch() -> Any:
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
    # Not PyTorch's own words: they advise to read the file again with weights_only=False.
    if found := re.search(r"GLOBAL (\S+)", str(error)):
        return f"refused, because the pickle asks for {found[1]} and only plain tensors are read"
    return f"damaged, or not a PyTorch file of plain tensors ({type(error).__name__})"
