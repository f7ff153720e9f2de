"""Files of named tensors, read lazily: PyTorch `.bin`/`.pt`/`.pth` or `.safetensors` files in, NumPy arrays out.

Opening a file reads names, shapes and dtypes. A tensor's data is read when it is asked for, so that files larger than
memory can be read one tensor at a time. Pickles are read with `weights_only=True`, so that no code in them runs.
`ShardedTensors` is several such files, with an index or without; `Tensors` is the interface of both. `open_tensors`
finds the files of a folder among the names under which they are published.
"""

from __future__ import annotations

import json
import math
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from emu_jax.errors import UserError
from emu_jax.storage import failed_file, read_json_object

SUFFIXES = (".bin", ".pt", ".pth", ".safetensors")
INSTALL = "pip install emu-jax[convert]"
NESTS = ("module", "state_dict")  # names under which trainers nest the weights beside their own state
# Bytes read before a file is opened again: pages of a memory map count as the process's memory while it is open.
REOPEN = 1 << 28
VARIANTS = ("", "fp32", "bf16", "fp16")  # what a file's name says of its precision; others are other weights
# Names by which a folder shows that it holds some weights, though none that can be read.
WEIGHTS_LIKE = (
    *SUFFIXES,
    ".ckpt",
    ".gguf",
    ".h5",
    ".msgpack",
    ".onnx",
    ".incomplete",
    ".part",
    ".crdownload",
    ".aria2",
)
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
            raise UserError(f"{path}: {_absent(self.path)}; expected a file of weights ({', '.join(SUFFIXES)})")
        if why := failed_file(self.path) or _truncated(self.path):
            raise UserError(f"{path}: {why}; nothing was loaded")
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
    """The tensors of several files of a folder.

    Args:
      files: the shards.
      index: says in which shard each tensor is, such as `model.safetensors.index.json`; None: nothing says so.
    """

    def __init__(self, files: Sequence[Path], index: Path | None = None):
        self.path = files[0].parent
        shard_of = None if index is None else read_index(index)
        shards = {file.name: TensorFile(file) for file in files}
        self.files = tuple(shard.path for shard in shards.values())
        self.shapes, self.dtypes, self.others, self._shard = {}, {}, {}, {}
        for file, shard in shards.items():
            for name in (*shard, *shard.others):
                if name in self.shapes or name in self.others:
                    self.others[name] = f"repeated in {file}"
                elif shard_of is not None and shard_of.get(name) != file:
                    self.others[name] = f"in {file}, which {index.name if index else ''} does not say"
                elif name in shard.others:
                    self.others[name] = shard.others[name]
                else:
                    self.shapes[name], self.dtypes[name] = shard.shapes[name], shard.dtypes[name]
                    self._shard[name] = shard
        for name, file in (shard_of or {}).items():
            if name not in self.shapes and name not in self.others:
                self.others[name] = f"listed in {index.name if index else ''}, absent from {file}"

    def __getitem__(self, name: str) -> np.ndarray:
        return self._shard[name][name]


def read_index(index: Path) -> dict[str, str]:
    """Tensor -> name of its shard, from a file such as `model.safetensors.index.json`.

    Raises:
      UserError: it is no such file.
    """
    if index.stat().st_size > INDEX_LIMIT:
        raise UserError(f"{index}: larger than {INDEX_LIMIT >> 20} MiB; expected an index of tensor names")
    expected = 'expected {"weight_map": {name: file}}'
    weight_map = read_json_object(index, f"an index of shards, {expected}").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: holds no weight_map; {expected}")
    if wrong := [name for name, file in weight_map.items() if not isinstance(file, str)]:
        raise UserError(f"{index}: {wrong[0]} is in {weight_map[wrong[0]]!r}; {expected}")
    return weight_map


def open_tensors(folder: Path, names: Sequence[str], expected: str) -> Tensors:
    """The tensors of a folder, from the first of its files in this order.

    Full precision comes before the variants fp32, bf16 and fp16; of one precision, the `names` in their order; of one
    name, the whole file, then the shards of its index, then shards whose names count them (`…-00001-of-00003.bin`).
    An index none of whose shards is there does not count.

    Args:
      names: of whole files, such as `model.safetensors`.
      expected: what the folder should hold, for errors.

    Raises:
      UserError: none of them is there; shards are missing; or a file is damaged.
    """
    unused = ""
    for variant in VARIANTS:
        for name in names:
            stem, _, suffix = name.rpartition(".")
            file = folder / _with_variant(stem, variant, suffix)
            if file.is_file():
                return TensorFile(file)
            for index in _indexes(folder, name, variant):
                files = sorted(set(read_index(index).values()))
                absent = [each for each in files if Path(each).name != each or not (folder / each).is_file()]
                if not absent:
                    return ShardedTensors([folder / each for each in files], index)
                line = f"{index}: lists {_few(absent)}, which is no file in {folder}{_seen(folder)}; {AGAIN}"
                if len(absent) < len(files):
                    raise UserError(line)
                unused = unused or line  # often downloaded beside the other format's shards
            if shards := _counted(folder, stem, variant, suffix):
                return ShardedTensors(shards)
    raise UserError(unused or f"{folder}: holds no weights; expected {expected}{_seen(folder)}")


AGAIN = "download the folder again"


def _with_variant(stem: str, variant: str, suffix: str) -> str:
    return f"{stem}.{variant}.{suffix}" if variant else f"{stem}.{suffix}"


def _indexes(folder: Path, name: str, variant: str) -> list[Path]:
    """The index of the shards of a file, under the names that transformers and diffusers give it."""
    if not variant:
        places = [f"{name}.index.json"]
    else:
        stem, _, suffix = name.rpartition(".")
        places = [
            f"{name}.index.{variant}.json",
            f"{stem}.{variant}.{suffix}.index.json",
            f"{name}.{variant}.index.json",
        ]
    return [folder / place for place in places if (folder / place).is_file()]


def _counted(folder: Path, stem: str, variant: str, suffix: str) -> list[Path]:
    """The shards whose names count them, all of them; [] if there are none.

    Raises:
      UserError: some are missing, or there are shards of several counts.
    """
    of = f"{re.escape(stem)}{re.escape(f'.{variant}') if variant else ''}"
    name = re.compile(rf"{of}-(?P<number>\d{{5}})-of-(?P<count>\d{{5}})\.{re.escape(suffix)}")
    found = {
        file: match for file in sorted(folder.iterdir()) if (match := name.fullmatch(file.name)) and file.is_file()
    }
    if not found:
        return []
    counts = sorted({int(match["count"]) for match in found.values()})
    if len(counts) > 1:
        raise UserError(
            f"{folder}: holds shards of {stem} that are parts of {counts[0]} and of {counts[-1]} files; {AGAIN}"
        )
    numbers = {int(match["number"]) for match in found.values()}
    if missing := [number for number in range(1, counts[0] + 1) if number not in numbers]:
        names = [f"{stem}{f'.{variant}' if variant else ''}-{n:05}-of-{counts[0]:05}.{suffix}" for n in missing[:4]]
        raise UserError(f"{folder}: holds {len(found)} of {counts[0]} shards; {_few(names)} is missing; {AGAIN}")
    return list(found)


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _seen(folder: Path) -> str:
    """What a folder holds that looks like weights, for errors."""
    files = [file for file in sorted(folder.iterdir()) if file.name.endswith(WEIGHTS_LIKE)] if folder.is_dir() else []
    if not files:
        return ""
    return (
        f"; the folder holds {_few([file.name if file.exists() else f'{file.name} (a broken link)' for file in files])}"
    )


def _absent(path: Path) -> str:
    return f"a link to {path.readlink()}, which is not there" if path.is_symlink() else "no such file"


def _truncated(path: Path) -> str:
    """That a file ends too early, if its own beginning shows that."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if path.suffix != ".safetensors":
            if file.read(4) != b"PK\x03\x04":
                return ""
            try:
                is_whole = zipfile.is_zipfile(path)
            except zipfile.BadZipFile:  # it has an end, which is damaged
                is_whole = True
            return "" if is_whole else f"truncated after {size:,} bytes; download it again"
        length = int.from_bytes(file.read(8), "little")
        is_whole = size >= 8 and length <= INDEX_LIMIT and size >= 8 + length
        try:
            header = json.loads(file.read(length)) if is_whole else {}
            ends = [int(entry["data_offsets"][1]) for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return ""
    whole = 8 + length + max(ends, default=0)
    if length <= INDEX_LIMIT and size < whole:
        return f"truncated after {size:,} of {whole:,} bytes or more; download it again"
    return ""


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
