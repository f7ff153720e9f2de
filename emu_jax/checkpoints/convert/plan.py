"""What a conversion does, as data: which tensors of which files become which slices of which leaves.

Every reader of a foreign format (`emu.py`, `llama.py`, `eva_clip.py`, `diffusers.py`) gives a `Plan` once every key is
accounted for. `gather` carries one out in memory; `stream.py` writes it to a checkpoint, a tensor at a time.
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
class Step:
    """`make` of the source tensors `names` is the leaf's slice at `layer` of its leading axis (None: all of it)."""

    leaf: str
    layer: int | None
    names: tuple[str, ...]
    make: Callable[..., np.ndarray]


@dataclasses.dataclass(frozen=True)
class Plan:
    """A conversion in which every tensor and every slice of every leaf stands exactly once.

    Attributes:
      tensors: where names are read.
      config: the experiment's config that the checkpoint carries.
      shapes: leaf, e.g. `params/llama/final_norm/scale`, -> shape.
      dtypes: of leaves that keep their own whatever precision is chosen.
      steps: in the order of the leaves.
      about: JSON-serialisable, for the manifest.
    """

    tensors: Tensors
    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    steps: tuple[Step, ...]
    dtypes: dict[str, np.dtype] = dataclasses.field(default_factory=dict)
    about: dict[str, Any] = dataclasses.field(default_factory=dict)

    def make(self, step: Step) -> np.ndarray:
        """A step's slice, read now."""
        return step.make(*(self.tensors[name] for name in step.names))


def check_dtype(dtype: str) -> np.dtype:
    """NumPy's dtype of parameters in `dtype`."""
    if dtype not in DTYPES:
        raise UserError(f"dtype={dtype!r} for weights; expected one of {', '.join(DTYPES)}")
    return DTYPES[dtype]


def gather(plan: Plan, dtype: str = "float32") -> dict[str, Any]:
    """Carries a plan out in memory: its leaves as a nested dict of NumPy arrays."""
    wanted = check_dtype(dtype)
    flat = {leaf: np.empty(shape, plan.dtypes.get(leaf, wanted)) for leaf, shape in plan.shapes.items()}
    for step in plan.steps:
        flat[step.leaf][... if step.layer is None else step.layer] = plan.make(step)
    return nest(flat)


def unreadable(tensors: Tensors) -> tuple[Fault, ...]:
    """What stands in the files and is no tensor of a floating type."""
    return (
        *(Fault("unknown", name, kind) for name, kind in tensors.others.items()),
        *(
            Fault("unreadable", name, f"{kind}, expected a floating type of 16 to 64 bits")
            for name, kind in tensors.dtypes.items()
            if not isinstance(kind, np.dtype)
        ),
    )


def source_dtypes(tensors: Tensors, names: Mapping[str, str]) -> dict[str, str]:
    """Published key -> the word for its dtype in the file, so that an export can give it back."""
    return {key: str(tensors.dtypes[name]) for key, name in names.items()}
