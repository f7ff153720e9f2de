"""Carries a plan out, a tensor at a time: foreign files -> a checkpoint that training and inference read.

Memory stays below a few times the largest tensor, whatever the model's size. Nothing is written before every key is
accounted for; the folder gets its name when everything is in it; a run that was killed goes on where it stopped.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from emu_jax.checkpoints.convert.plan import Plan, Step, check_dtype
from emu_jax.checkpoints.store import pack_tokenizer, read_meta
from emu_jax.checkpoints.streamed import LeafWriter
from emu_jax.data.tokenizer import Tokenizer
from emu_jax.errors import UserError
from emu_jax.models.quantise import SCALE, is_quantised, quantise

BLOCK = 8 << 20  # bytes hashed at a time


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a conversion did: bytes it read, bytes of the result, seconds, tensors that an earlier run had written."""

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
    plan: Plan,
    folder: Path,
    beside: Mapping[str, Path] | None = None,
    *,
    waiting: bool = False,
    dtype: str = "float32",
    int8: bool = False,
    tokenizer: Tokenizer | None = None,
    constants: Mapping[str, np.ndarray] | None = None,
) -> Summary:
    """Writes a plan's leaves into a new checkpoint.

    Args:
      beside: folders that are moved into it, by their names there.
      waiting: it is one of those itself: left as it is where the same conversion has finished it, else replaced.
      dtype: of parameters, float32 or bfloat16; leaves of `plan.dtypes` keep their own.
      int8: the language model's kernels as 8-bit integers with a scale a column (`models/quantise.py`).
      tokenizer: kept with the weights, where it is known.
      constants: leaves that come from no file.

    Raises:
      UserError: the folder exists, or a source cannot be read; nothing is left behind.
    """
    began = time.monotonic()
    wanted = check_dtype(dtype)
    constants = dict(constants or {})
    leaves: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
    for leaf, shape in plan.shapes.items():
        if int8 and is_quantised(leaf):
            leaves[leaf] = (shape, np.dtype(np.int8))
            leaves[_scale_of(leaf)] = ((shape[0], shape[-1]), np.dtype(np.float32))
        else:
            leaves[leaf] = (shape, plan.dtypes.get(leaf, wanted))
    # A kernel's scale is stacked like it.
    stacked = {leaf for step in plan.steps if step.layer is not None for leaf in (step.leaf, _scale_of(step.leaf))}
    leaves |= {leaf: (value.shape, value.dtype) for leaf, value in constants.items()}
    config = json.loads(json.dumps(plan.config))
    for part in ("model", "unet", "vae"):
        if part in config:
            config[part]["param_dtype"] = dtype
    if int8:
        config["model"]["llama"]["int8"] = True
    job = _fingerprint([config, plan.about, _stat(plan.tensors.files), _described(leaves)])

    if waiting and folder.exists():
        if read_meta(folder).get("job") == job:
            return Summary(0, _size(leaves), 0.0, len(plan.steps))
        shutil.rmtree(folder)

    def run(writer: LeafWriter, hashes: concurrent.futures.Future) -> int:
        sizes = [sum(map(plan.tensors.nbytes, step.names)) for step in plan.steps]
        waiting = [number for number in range(len(sizes)) if number not in writer.done]
        read = sum(sizes[number] for number in waiting)
        with tqdm(total=sum(sizes), initial=sum(sizes) - read, desc=folder.name, unit="B", unit_scale=True) as bar:
            for number in waiting:
                writer.write(number, plan.steps[number].layer, _slices(plan, plan.steps[number], int8))
                bar.update(sizes[number])
        for number, (leaf, value) in enumerate(constants.items(), len(plan.steps)):
            if number not in writer.done:
                writer.write(number, None, {leaf: value})
        writer.finish(
            {
                "config": config,
                "tokenizer": pack_tokenizer(tokenizer),
                "source": plan.about | {"files": hashes.result()},
                "job": job,
            },
            beside or {},
        )
        return read

    with concurrent.futures.ThreadPoolExecutor(1) as pool, _writing(LeafWriter(folder, leaves, stacked, job)) as writer:
        resumed = len(writer.done)
        read = run(writer, pool.submit(_hashes, plan.tensors.files))
    return Summary(read, _size(leaves), time.monotonic() - began, resumed)


def _size(leaves: Mapping[str, tuple[tuple[int, ...], np.dtype]]) -> int:
    return sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in leaves.values())


@contextlib.contextmanager
def _writing(writer: LeafWriter) -> Iterator[LeafWriter]:
    """A source that turns out damaged, or a full disk, leaves nothing behind; an interruption can be gone on from."""
    try:
        yield writer
    except UserError:
        writer.discard()
        raise
    except (OSError, ValueError) as error:  # TensorStore raises ValueError where a file cannot be written
        writer.discard()
        reason = str(error).partition("\n")[0][:300]
        raise UserError(f"--to {writer.folder}: cannot be written ({reason}); nothing was left there") from error


def _slices(plan: Plan, step: Step, int8: bool) -> dict[str, np.ndarray]:
    value = plan.make(step)
    if not (int8 and is_quantised(step.leaf)):
        return {step.leaf: value}
    kernel, scale = quantise(value)
    return {step.leaf: kernel, _scale_of(step.leaf): scale}


def _scale_of(leaf: str) -> str:
    """The leaf of a quantised kernel's scales."""
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
