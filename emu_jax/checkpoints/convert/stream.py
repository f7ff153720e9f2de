"""Carries out a conversion one tensor at a time: foreign files -> a checkpoint for training and inference.

Memory stays below a few times the largest tensor, whatever the model's size. Nothing is written before every key is
accounted for, and the folder gets its name once it is complete. A run that was killed resumes where it stopped.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from emu_jax.checkpoints.convert.conversion import Assignment, Conversion, check_dtype
from emu_jax.checkpoints.store import pack_tokenizer, read_meta
from emu_jax.checkpoints.streamed import LeafWriter
from emu_jax.data.tokenizer import Tokenizer
from emu_jax.errors import UserError
from emu_jax.models.quantise import SCALE, is_quantised, quantise
from emu_jax.storage import remove

BLOCK = 8 << 20  # bytes hashed at a time


@dataclasses.dataclass(frozen=True)
class Summary:
    """Figures of a finished conversion.

    Attributes:
      read: bytes read by this run. size: bytes of the result.
      resumed: tensors that an earlier run had written.
    """

    read: int
    size: int
    seconds: float
    resumed: int

    def __str__(self) -> str:
        done = f", {self.resumed} tensors written by an earlier run" if self.resumed else ""
        rate = self.read / max(self.seconds, 1e-9) / 1e9
        return (
            f"{self.read / 1e9:.2f} GB read, {self.size / 1e9:.2f} GB written in {self.seconds:.1f} s, "
            f"{rate:.2f} GB/s{done}"
        )


def write(
    conversion: Conversion,
    folder: Path,
    beside: Mapping[str, Path] | None = None,
    *,
    waiting: bool = False,
    dtype: str = "float32",
    int8: bool = False,
    tokenizer: Tokenizer | None = None,
    constants: Mapping[str, np.ndarray] | None = None,
) -> Summary:
    """Writes a conversion's leaves to a new checkpoint.

    Args:
      beside: folders to move into the checkpoint, by their names there.
      waiting: whether this checkpoint will itself be moved into another. If the same conversion already finished it,
        it is kept; otherwise it is replaced.
      dtype: dtype of parameters, float32 or bfloat16; leaves in `conversion.dtypes` keep their own.
      int8: store the language model's kernels as 8-bit integers with a scale per column (`models/quantise.py`).
      tokenizer: stored with the weights, if it is known.
      constants: leaves that come from no file.

    Raises:
      UserError: the folder exists, a source cannot be read, or the folder cannot be written; nothing is left behind.
    """
    began = time.monotonic()
    wanted = check_dtype(dtype)
    constants = dict(constants or {})
    leaves: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
    for leaf, shape in conversion.shapes.items():
        if int8 and is_quantised(leaf):
            leaves[leaf] = (shape, np.dtype(np.int8))
            leaves[_scale_of(leaf)] = ((shape[0], shape[-1]), np.dtype(np.float32))
        else:
            leaves[leaf] = (shape, conversion.dtypes.get(leaf, wanted))
    layered = [assignment.leaf for assignment in conversion.assignments if assignment.layer is not None]
    stacked = {*layered, *map(_scale_of, layered)}  # a kernel's scale is stacked like the kernel
    leaves |= {leaf: (value.shape, value.dtype) for leaf, value in constants.items()}
    config = json.loads(json.dumps(conversion.config))
    for part in ("model", "unet", "vae"):
        if part in config:
            config[part]["param_dtype"] = dtype
    if int8:
        config["model"]["llama"]["int8"] = True
    tensors, assignments = conversion.tensors, conversion.assignments
    job = _fingerprint([conversion.holds, config, conversion.about, _stat(tensors.files), _described(leaves)])

    if waiting and folder.exists():
        if read_meta(folder).get("job") == job:
            return Summary(0, _size(leaves), 0.0, len(assignments))
        remove(folder)

    def run(writer: LeafWriter, hashes: concurrent.futures.Future) -> int:
        sizes = [sum(map(tensors.nbytes, assignment.names)) for assignment in assignments]
        missing = [number for number in range(len(sizes)) if number not in writer.done]
        read = sum(sizes[number] for number in missing)
        with tqdm(total=sum(sizes), initial=sum(sizes) - read, desc=folder.name, unit="B", unit_scale=True) as bar:
            for number in missing:
                writer.write(number, assignments[number].layer, _slices(conversion, assignments[number], int8))
                bar.update(sizes[number])
        for number, (leaf, value) in enumerate(constants.items(), len(assignments)):
            if number not in writer.done:
                writer.write(number, None, {leaf: value})
        meta = {
            "config": config,
            "tokenizer": pack_tokenizer(tokenizer),
            "source": conversion.about | {"files": hashes.result()},
            "job": job,
        }
        writer.finish(conversion.holds, meta, beside or {})
        return read

    with concurrent.futures.ThreadPoolExecutor(1) as pool, _writing(LeafWriter(folder, leaves, stacked, job)) as writer:
        resumed = len(writer.done)
        read = run(writer, pool.submit(_hashes, tensors.files))
    return Summary(read, _size(leaves), time.monotonic() - began, resumed)


def _size(leaves: Mapping[str, tuple[tuple[int, ...], np.dtype]]) -> int:
    return sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in leaves.values())


@contextlib.contextmanager
def _writing(writer: LeafWriter) -> Iterator[LeafWriter]:
    """Leaves nothing behind when a source is damaged or the disk is full; after an interruption, work can resume."""
    try:
        yield writer
    except UserError:
        writer.discard()
        raise
    except (OSError, ValueError) as error:  # TensorStore raises ValueError if a file cannot be written
        writer.discard()
        reason = str(error).partition("\n")[0][:300]
        raise UserError(f"{writer.folder}: cannot be written ({reason}); nothing was left there") from error


def _slices(conversion: Conversion, assignment: Assignment, int8: bool) -> dict[str, np.ndarray]:
    leaf, value = assignment.leaf, conversion.make(assignment)
    if not (int8 and is_quantised(leaf)):
        return {leaf: value}
    kernel, scale = quantise(value)
    return {leaf: kernel, _scale_of(leaf): scale}


def _scale_of(leaf: str) -> str:
    """The leaf that holds a quantised kernel's scales."""
    return leaf.removesuffix("kernel") + SCALE


def _described(leaves: Mapping[str, tuple[tuple[int, ...], np.dtype]]) -> dict[str, list]:
    return {name: [list(shape), dtype.name] for name, (shape, dtype) in leaves.items()}


def _fingerprint(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _stat(files: tuple[Path, ...]) -> list[list]:
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def _hashes(files: tuple[Path, ...]) -> dict[str, dict[str, Any]]:
    """SHA-256 and size of every file."""
    result = {}
    for file in files:
        digest = hashlib.sha256()
        with file.open("rb") as stream:
            while block := stream.read(BLOCK):
                digest.update(block)
        result[file.name] = {"sha256": digest.hexdigest(), "bytes": file.stat().st_size}
    return result
