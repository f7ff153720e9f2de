"""The device mesh, and the one table from logical axis names to mesh axes.

Models and states name logical axes only ("embed", "heads", "batch", …). In: `config.train.mesh` and the devices at
hand. Out: a mesh, shardings for trees of arrays, and `constrain` for activations.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from emu_jax.errors import UserError

AXES = ("data", "fsdp", "tensor", "context")

# Parameters are split over `fsdp` along their embedding axis and over `tensor` along heads, MLP and vocabulary.
# Activations are split over rows; pictures are spread over all data-parallel devices whatever row they belong to.
TABLE: dict[str | None, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
    "image": ("data", "fsdp"),
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
    "buckets": None,
    None: None,
}


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with `AXES` from sizes such as {"data": 1, "fsdp": -1}; a missing axis is 1, -1 takes what is left."""
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
    # `jax.make_mesh` orders TPU chips so that neighbours in the mesh are neighbours on the wires.
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def partition_spec(logical: Sequence[str | None], shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
    """The table's mesh axes for one array; a dimension that the axes do not divide stays whole on every device."""
    entries = []
    for name, size in zip(logical, shape, strict=True):
        axes = TABLE[name]
        names = (axes,) if isinstance(axes, str) else axes or ()
        parts = math.prod(mesh.shape[axis] for axis in names)
        entries.append(axes if parts > 1 and size % parts == 0 else None)
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


def constrain(x: jax.Array, logical: Sequence[str | None]) -> jax.Array:
    """Asks the compiler to lay activations out by the table; nothing outside `jax.set_mesh`."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or math.prod(mesh.shape.values()) == 1:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(logical, x.shape, mesh))


def batch_shardings(mesh: Mesh, batch: Any) -> Any:
    """Rows over (data, fsdp): the leading axis of every field of a batch; error when the rows do not divide."""
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    rows = jax.tree.leaves(batch)[0].shape[0]
    if rows % parts:
        raise UserError(
            f"config.data.batch_rows={rows} does not divide over {parts} data-parallel devices "
            f"(data={mesh.shape['data']} x fsdp={mesh.shape['fsdp']}); choose a multiple of {parts}"
        )
    return jax.tree.map(lambda leaf: sharding(mesh, ("batch", *(None,) * (leaf.ndim - 1)), leaf.shape), batch)
