"""The device mesh, and the logical axis rules that map logical axis names to mesh axes.

Models and states only name logical axes ("embed", "heads", "batch", …). In: `config.train.mesh` and the available
devices. Out: a mesh, shardings for trees of arrays, and `with_logical_constraint` for activations.
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

# Mesh axes. `slice` is data parallel over the slow network between TPU slices; the others (data parallel, FSDP, tensor
# parallel, context parallel) use the fast network within a slice.
AXES = ("slice", "data", "fsdp", "tensor", "context")
ROWS = ("slice", "data", "fsdp")  # the axes that shard a batch's rows
REPLICAS = ("slice", "data")  # those of them over which parameters are replicated

# FSDP shards parameters along their embedding axis, tensor parallelism along heads, MLP and vocabulary. They are
# replicated over slices, so that only gradients cross between slices. Activations are sharded by rows, and under
# context parallelism along the sequence. Images are sharded over all of these devices, independently of their rows.
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
    "codes": None,
    None: None,
}


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with `AXES` from sizes such as {"data": 1, "fsdp": -1}: -1 takes the remaining devices, no size means 1.

    With several TPU slices, the axis `slice` must be their number; otherwise it divides the devices into equal groups.

    Raises:
      UserError: an axis is unknown, or the sizes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    for name in sizes:
        if name not in AXES:
            raise UserError(f"config.train.mesh.{name} is not a mesh axis; choose among {', '.join(AXES)}")
    shape = [int(sizes.get(name, 1)) for name in AXES]
    named = ", ".join(f"{name}={size}" for name, size in zip(AXES, shape, strict=True))
    if shape.count(-1) > 1 or any(size == 0 or size < -1 for size in shape):
        raise UserError(f"config.train.mesh ({named}): sizes are 1 or more, and at most one is -1 (all other devices)")
    if -1 in shape:
        fixed = math.prod(size for size in shape if size != -1)
        shape[shape.index(-1)] = len(devices) // fixed if len(devices) % fixed == 0 else 0
    if math.prod(shape) != len(devices):
        raise UserError(f"config.train.mesh ({named}) does not multiply to the {len(devices)} available devices")
    by_slice: dict[int, list[jax.Device]] = {}
    for device in devices:
        by_slice.setdefault(getattr(device, "slice_index", None) or 0, []).append(device)
    count = shape[0]
    if len(by_slice) > 1 and len(by_slice) != count:
        raise UserError(
            f"config.train.mesh ({named}): the devices are in {len(by_slice)} slices; set config.train.mesh.slice to it"
        )
    size = len(devices) // count
    groups = (
        list(by_slice.values()) if len(by_slice) > 1 else [devices[i * size : (i + 1) * size] for i in range(count)]
    )
    types = (AxisType.Auto,) * len(AXES)
    # Orders TPU chips so that neighbours in the mesh are physical neighbours, as far as the axes allow.
    within = [mesh_utils.create_device_mesh(shape[1:], group, allow_split_physical_axes=True) for group in groups]
    return Mesh(np.stack(within), AXES, axis_types=types)


def partition_spec(
    logical: Sequence[str | None], shape: Sequence[int], mesh: Mesh | AbstractMesh, *, uneven: bool = False
) -> PartitionSpec:
    """The mesh axes of one array by the logical axis rules.

    A dimension that its mesh axes do not divide is sharded over as many of the first ones as do, or replicated. With
    `uneven` it is sharded over all of them. Within `jax.shard_map`, the axes that it maps are left out.
    """
    entries = []
    for name, size in zip(logical, shape, strict=True):
        axes = LOGICAL_AXIS_RULES[name]
        names = tuple(axis for axis in ((axes,) if isinstance(axes, str) else axes or ()) if is_auto(mesh, axis))
        while names and not uneven and size % math.prod(mesh.shape[axis] for axis in names):
            names = names[:-1]
        sharded = math.prod(mesh.shape[axis] for axis in names) > 1
        entries.append((names if len(names) > 1 else names[0]) if sharded else None)
    return PartitionSpec(*entries)


def is_auto(mesh: Mesh | AbstractMesh, axis: str) -> bool:
    """Whether the compiler shards over a mesh axis; within `jax.shard_map` it does not over those that it maps."""
    return mesh.axis_types[mesh.axis_names.index(axis)] == AxisType.Auto


def sharding(mesh: Mesh | AbstractMesh, logical: Sequence[str | None], shape: Sequence[int]) -> NamedSharding:
    """`partition_spec` on `mesh`."""
    return NamedSharding(mesh, partition_spec(logical, shape, mesh))


def tree_shardings(mesh: Mesh | AbstractMesh, logical: Any, shapes: Any) -> Any:
    """Shardings for a tree of arrays or ShapeDtypeStructs, from a tree of the same structure with logical axes."""
    return jax.tree.map(
        lambda names, leaf: sharding(mesh, names, leaf.shape),
        logical,
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """A full copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def with_logical_constraint(x: jax.Array, logical: Sequence[str | None], *, uneven: bool = False) -> jax.Array:
    """`jax.lax.with_sharding_constraint` by the logical axis rules; no effect outside `jax.set_mesh`.

    Intermediate values may be sharded unevenly (`uneven`), with less on the last devices; program arguments may not.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or math.prod(mesh.shape.values()) == 1:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(logical, x.shape, mesh, uneven=uneven))


def num_shards(logical: str, size: int) -> int:
    """Number of shards of a dimension with this logical axis and size on the current mesh; 1 outside `jax.set_mesh`."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return 1
    axes = partition_spec((logical,), (size,), mesh)[0] or ()
    return math.prod(mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes))


def platform() -> str:
    """Platform of the current mesh's devices, real or abstract: "tpu", "cpu" or "gpu"; JAX's default without one."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform
