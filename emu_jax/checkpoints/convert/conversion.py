"""A conversion as data: it assigns tensors of files to slices of leaves.

Every reader of a foreign format (`emu.py`, `llama.py`, `eva_clip.py`, `diffusers.py`) returns a `Conversion` once every
key is accounted for. `gather` carries it out in memory; `stream.py` writes it to a checkpoint, one tensor at a time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from emu_jax.checkpoints.convert.matching import Fault
from emu_jax.checkpoints.convert.tensor_files import Tensors
from emu_jax.errors import UserError
from emu_jax.models.paths import nest

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


@dataclasses.dataclass(frozen=True)
class Assignment:
    """Assigns `make` of the source tensors `names` to the leaf's slice at `layer` of its leading axis (None: all)."""

    leaf: str
    layer: int | None
    names: tuple[str, ...]
    make: Callable[..., np.ndarray]


@dataclasses.dataclass(frozen=True)
class Conversion:
    """Uses every tensor, and assigns every slice of every leaf, exactly once.

    Attributes:
      tensors: the source, where names are read.
      holds: what the parameters are (`store.Checkpoint.holds`), or "safety_checker".
      config: the groups of a config that describe the parameters.
      shapes: leaf, e.g. `params/llama/final_norm/scale`, -> shape.
      assignments: in the order of the leaves.
      dtypes: dtypes of the leaves that keep their own whatever precision is chosen.
      axes: the logical axes of the leaves that are parameters of a model.
      about: notes on the source for the metadata; JSON-serialisable.
    """

    tensors: Tensors
    holds: str
    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    assignments: tuple[Assignment, ...]
    dtypes: dict[str, np.dtype] = dataclasses.field(default_factory=dict)
    axes: dict[str, tuple[str | None, ...]] = dataclasses.field(default_factory=dict)
    about: dict[str, Any] = dataclasses.field(default_factory=dict)

    def make(self, assignment: Assignment) -> np.ndarray:
        """An assignment's slice, read now."""
        return assignment.make(*(self.tensors[name] for name in assignment.names))


def check_dtype(dtype: str) -> np.dtype:
    """The NumPy dtype of parameters in `dtype`; UserError if it is not one of `DTYPES`."""
    if dtype not in DTYPES:
        raise UserError(f"dtype={dtype!r} for weights; expected one of {', '.join(DTYPES)}")
    return DTYPES[dtype]


def gather(conversion: Conversion, dtype: str = "float32") -> dict[str, Any]:
    """Carries a conversion out in memory: its leaves as a nested dict of NumPy arrays."""
    wanted = check_dtype(dtype)
    flat = {leaf: np.empty(shape, conversion.dtypes.get(leaf, wanted)) for leaf, shape in conversion.shapes.items()}
    for assignment in conversion.assignments:
        flat[assignment.leaf][... if assignment.layer is None else assignment.layer] = conversion.make(assignment)
    return nest(flat)


def unreadable(tensors: Tensors) -> tuple[Fault, ...]:
    """Entries of the files that are no tensors of a floating type."""
    return (
        *(Fault("unknown", name, kind) for name, kind in tensors.others.items()),
        *(
            Fault("unreadable", name, f"{kind}, expected a floating type of 16 to 64 bits")
            for name, kind in tensors.dtypes.items()
            if not isinstance(kind, np.dtype)
        ),
    )


def source_dtypes(tensors: Tensors, names: Mapping[str, str]) -> dict[str, str]:
    """Published key -> its dtype in the file, so that an export can restore it."""
    return {key: str(tensors.dtypes[name]) for key, name in names.items()}
