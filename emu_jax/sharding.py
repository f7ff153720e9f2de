"""The device mesh, and the one table from logical axis names to mesh axes.

Models and states name logical axes only ("embed", "heads", "batch", …). In: `config.train.mesh` and the devices at
hand. Out: a mesh, shardings for trees of arrays, and `with_logical_constraint` for activations.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from emu_jax.errors import UserError

# `slice` runs over the slow network between TPU slices, all others over the fast one within a slice.
AXES = ("slice", "data", "fsdp", "tensor", "context")
ROWS = ("slice", "data", "fsdp")  # the axes that a batch's rows are split over

# Parameters are split over `fsdp` along their embedding axis and over `tensor` along heads, MLP and vocabulary; every
# slice holds them all, so that only gradients cross between slices. Activations are split over rows, and over
# `context` along the sequence; images are spread over all of these devices whatever row they belong to.
LOGICAL_AXIS_RULES: dict[str | None, str | tuple[str, ...] | None] = {
    "batch": ROWS,
    "image": (*ROWS, "context"),
    "sequence": "context",
    "embed": "fsdp",
    "heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    "embed_act": None,
    "layers": None,
    "norm": None,
    "patches": None,
    "pixels": None,
    "queries": None,
    "rank": None,
    "buckets": None,
    None: None,
}


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with `AXES` from sizes such as {"data": 1, "fsdp": -1}; a missing axis is 1, -1 takes what is left.

    On several TPU slices the axis `slice` must be their number; elsewhere it cuts the devices in equal runs.
    """
    devices = list(jax.devices() if devices is None else devices)
    for name in sizes:
        if name not in AXES:
            raise UserError(f"config.train.mesh.{name} is no mesh axis; choose among {', '.join(AXES)}")
    shape = [int(sizes.get(name, 1)) for name in AXES]
    named = ", ".join(f"{name}={size}" for name, size in zip(AXES, shape, strict=True))
    if shape.count(-1) > 1 or any(size == 0 or size < -1 for size in shape):
        raise UserError(f"config.train.mesh ({named}): sizes are 1 or more, and at most one is -1 (what is left)")
    if -1 in shape:
        fixed = math.prod(size for size in shape if size != -1)
        shape[shape.index(-1)] = len(devices) // fixed if len(devices) % fixed == 0 else 0
    if math.prod(shape) != len(devices):
        raise UserError(f"config.train.mesh ({named}) does not multiply to the {len(devices)} devices at hand")
    by_slice: dict[int, list[jax.Device]] = {}
    for device in devices:
        by_slice.setdefault(getattr(device, "slice_index", None) or 0, []).append(device)
    count = shape[0]
    if len(by_slice) > 1 and len(by_slice) != count:
        raise UserError(
            f"config.train.mesh ({named}): the devices are in {len(by_slice)} slices; set config.train.mesh.slice so"
        )
    size = len(devices) // count
    groups = (
        list(by_slice.values()) if len(by_slice) > 1 else [devices[i * size : (i + 1) * size] for i in range(count)]
    )
    types = (AxisType.Auto,) * len(AXES)
    # TPU chips are ordered so that neighbours in the mesh are neighbours on the wires, as far as axes can be cut so.
    within = [mesh_utils.create_device_mesh(shape[1:], group, allow_split_physical_axes=True) for group in groups]
    return Mesh(np.stack(within), AXES, axis_types=types)


def partition_spec(
    logical: Sequence[str | None], shape: Sequence[int], mesh: Mesh | AbstractMesh, *, uneven: bool = False
) -> PartitionSpec:
    """The table's mesh axes for one array.

    A dimension that they do not divide is split over as many of the first of them as do, and else whole everywhere;
    `uneven` splits it all the same.
    """
    entries = []
    for name, size in zip(logical, shape, strict=True):
        axes = LOGICAL_AXIS_RULES[name]
        names = (axes,) if isinstance(axes, str) else axes or ()
        while names and not uneven and size % math.prod(mesh.shape[axis] for axis in names):
            names = names[:-1]
        split = math.prod(mesh.shape[axis] for axis in names) > 1
        entries.append((names if len(names) > 1 else names[0]) if split else None)
    return PartitionSpec(*entries)


def sharding(mesh: Mesh, logical: Sequence[str | None], shape: Sequence[int]) -> NamedSharding:
    """`partition_spec` on `mesh`."""
    return NamedSharding(mesh, partition_spec(logical, shape, mesh))


def tree_shardings(mesh: Mesh, logical: Any, shapes: Any) -> Any:
    """Shardings for a tree of arrays or ShapeDtypeStructs and a like tree of logical-axis tuples."""
    return jax.tree.map(
        lambda names, leaf: sharding(mesh, names, leaf.shape),
        logical,
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """One whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def with_logical_constraint(x: jax.Array, logical: Sequence[str | None], *, uneven: bool = False) -> jax.Array:
    """Asks the compiler to lay activations out by the table; nothing outside `jax.set_mesh`.

    Results may be split unevenly, with the last devices holding less; arguments of a program may not.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or math.prod(mesh.shape.values()) == 1:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(logical, x.shape, mesh, uneven=uneven))


def num_shards(logical: str, size: int) -> int:
    """In how many parts the mesh in use splits a dimension of that name and size; 1 outside `jax.set_mesh`."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return 1
    axes = partition_spec((logical,), (size,), mesh)[0] or ()
    return math.prod(mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes))


def platform() -> str:
    """Of the devices that the mesh in use is made of, described or real: "tpu", "cpu" or "gpu"; else JAX's default."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform
