"""Carries out a conversion one tensor at a time: foreign files -> a checkpoint for training and inference.

Memory stays below a few times the largest tensor, whatever the model's size. Nothing is written before every key is
accounted for. A run that was killed resumes where it stopped (`streamed.resumable_folder`).
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import json
import math
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from tqdm import tqdm

from emu_jax.checkpoints.convert.conversion import Assignment, Conversion, check_dtype
from emu_jax.checkpoints.store import pack_tokenizer
from emu_jax.checkpoints.streamed import LeafWriter
from emu_jax.data.tokenizer import Tokenizer
from emu_jax.models.quantise import KINDS, SCALE, is_quantised, quantise, scale_shape
from emu_jax.storage import Path

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


@dataclasses.dataclass(frozen=True)
class Job:
    """A conversion with its settings: everything that `write` will write.

    Attributes:
      leaves: name -> shape and dtype of each leaf. axes: name -> its logical axes, for leaves that a mesh shards.
      config: the conversion's, with these settings.
      quantised: "int8" or "int4" if the language model's kernels are stored as integers with scales, or "".
      tokenizer: stored with the weights, if it is known.
      constants: leaves that come from no file.
    """

    conversion: Conversion
    leaves: dict[str, tuple[tuple[int, ...], np.dtype]]
    axes: dict[str, tuple[str | None, ...]]
    config: dict[str, Any]
    quantised: str
    tokenizer: Tokenizer | None
    constants: dict[str, np.ndarray]

    @property
    def fingerprint(self) -> str:
        """Differs if the sources or the result differ."""
        leaves = {name: [list(shape), dtype.name, self.axes.get(name)] for name, (shape, dtype) in self.leaves.items()}
        stats = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in self.conversion.tensors.files]
        tokenizer = pack_tokenizer(self.tokenizer)["fingerprint"]
        return fingerprint([self.conversion.holds, self.config, self.conversion.about, tokenizer, stats, leaves])

    @property
    def nbytes(self) -> int:
        """Bytes of the result."""
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.leaves.values())


def plan(
    conversion: Conversion,
    *,
    dtype: str = "float32",
    quantised: str = "",
    tokenizer: Tokenizer | None = None,
    constants: Mapping[str, np.ndarray] | None = None,
) -> Job:
    """The job that writes a conversion's leaves.

    Args:
      dtype: dtype of parameters, float32 or bfloat16; leaves in `conversion.dtypes` keep their own.
      quantised, tokenizer, constants: as in `Job`.
    """
    wanted = check_dtype(dtype)
    axes = dict(conversion.axes)
    for assignment in conversion.assignments:
        if assignment.layer is not None:  # adapters are written one layer at a time too
            axes.setdefault(assignment.leaf, ("layers", *(None,) * (len(conversion.shapes[assignment.leaf]) - 1)))
    leaves: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
    for leaf, shape in conversion.shapes.items():
        if quantised and is_quantised(leaf):
            scales = scale_shape(quantised, shape)
            leaves[leaf] = (shape, KINDS[quantised])
            leaves[_scale_of(leaf)] = (scales, np.dtype(np.float32))
            axes[_scale_of(leaf)] = (axes[leaf][0], *axes[leaf][1 - len(scales) :])
        else:
            leaves[leaf] = (shape, conversion.dtypes.get(leaf, wanted))
    leaves |= {leaf: (value.shape, value.dtype) for leaf, value in (constants or {}).items()}
    config = json.loads(json.dumps(conversion.config))
    for part in ("model", "unet", "vae"):
        if part in config:
            config[part]["param_dtype"] = dtype
    if quantised:
        config["model"]["llama"]["quantised"] = quantised
    return Job(conversion, leaves, axes, config, quantised, tokenizer, dict(constants or {}))


def write(job: Job, folder: Path) -> Summary:
    """Writes a checkpoint; resumes what an interrupted run of the same job left in `folder`.

    Raises:
      UserError: a source cannot be read. `streamed.resumable_folder` tells what else may happen.
    """
    began = time.monotonic()
    tensors, assignments = job.conversion.tensors, job.conversion.assignments
    writer = LeafWriter(folder, job.leaves, job.axes)
    if writer.complete:
        return Summary(0, job.nbytes, 0.0, len(assignments))
    sizes = [sum(map(tensors.nbytes, assignment.names)) for assignment in assignments]
    missing = [number for number in range(len(sizes)) if number not in writer.done]
    resumed, read = len(sizes) - len(missing), sum(sizes[number] for number in missing)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        hashes = pool.submit(_hashes, tensors.files)
        with tqdm(total=sum(sizes), initial=sum(sizes) - read, desc=folder.name, unit="B", unit_scale=True) as bar:
            for number in missing:
                writer.write(number, assignments[number].layer, _slices(job, assignments[number]))
                bar.update(sizes[number])
        for number, (leaf, value) in enumerate(job.constants.items(), len(assignments)):
            if number not in writer.done:
                writer.write(number, None, {leaf: value})
        meta = {
            "config": job.config,
            "tokenizer": pack_tokenizer(job.tokenizer),
            "source": job.conversion.about | {"files": hashes.result()},
        }
        writer.finish(job.conversion.holds, meta)
    return Summary(read, job.nbytes, time.monotonic() - began, resumed)


def _slices(job: Job, assignment: Assignment) -> dict[str, np.ndarray]:
    leaf, value = assignment.leaf, job.conversion.make(assignment)
    if not (job.quantised and is_quantised(leaf)):
        return {leaf: value}
    kernel, scale = quantise(value, job.quantised)
    return {leaf: kernel, _scale_of(leaf): scale}


def _scale_of(leaf: str) -> str:
    """The leaf that holds a quantised kernel's scales."""
    return leaf.removesuffix("kernel") + SCALE


def fingerprint(value: Any) -> str:
    """SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _hashes(files: tuple[pathlib.Path, ...]) -> dict[str, dict[str, Any]]:
    """SHA-256 and size of every file."""
    result = {}
    for file in files:
        digest = hashlib.sha256()
        with file.open("rb") as stream:
            while block := stream.read(BLOCK):
                digest.update(block)
        result[file.name] = {"sha256": digest.hexdigest(), "bytes": file.stat().st_size}
    return result
