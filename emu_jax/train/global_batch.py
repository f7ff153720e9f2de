"""Which rows of a global batch each process reads, and how they become global arrays."""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from emu_jax.errors import UserError
from emu_jax.sharding import ROWS, sharding


def row_parts(mesh: Mesh) -> int:
    """Number of parts over which a mesh spreads the rows of a batch."""
    return math.prod(mesh.shape[axis] for axis in ROWS)


def _check_rows(mesh: Mesh, rows: int) -> None:
    parts = row_parts(mesh)
    if rows % parts:
        product = " x ".join(f"{axis}={mesh.shape[axis]}" for axis in ROWS)
        raise UserError(
            f"config.data.batch_rows={rows} does not divide over {parts} data-parallel devices ({product}); choose a "
            f"multiple of {parts}"
        )


def own_rows(mesh: Mesh, rows: int) -> list[int]:
    """The rows of a batch that this process's devices hold, in order; several processes may hold the same row.

    Raises:
      UserError: the rows do not divide over the devices.
    """
    _check_rows(mesh, rows)
    held = sharding(mesh, ("batch",), (rows,)).addressable_devices_indices_map((rows,)).values()
    return sorted({row for index in held if index is not None for row in range(*index[0].indices(rows))})


def batch_shardings(mesh: Mesh, batch: Any) -> Any:
    """Shardings of a global batch: the leading axis of every field over the mesh axes `ROWS`.

    Raises:
      UserError: the rows do not divide over the devices.
    """
    _check_rows(mesh, jax.tree.leaves(batch)[0].shape[0])
    return jax.tree.map(lambda leaf: sharding(mesh, ("batch", *(None,) * (leaf.ndim - 1)), leaf.shape), batch)


def put_rows(values: np.ndarray, own: Sequence[int], rows: int, where: NamedSharding) -> jax.Array:
    """The global array [rows, …] from this process's rows of it, which are in the order of `own`."""

    def piece(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None  # the array has an axis
        start, stop, _ = index[0].indices(rows)
        first = bisect.bisect_left(own, start)  # a device's rows are consecutive, and all are in `own`
        return values[first : first + stop - start]

    return jax.make_array_from_callback((rows, *values.shape[1:]), where, piece)


def place_batch(mesh: Mesh, rows: int, arrays: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """This process's rows of a batch of `rows` -> global arrays on the mesh."""
    own = own_rows(mesh, rows)
    shapes = {name: jax.ShapeDtypeStruct((rows, *value.shape[1:]), value.dtype) for name, value in arrays.items()}
    shardings = batch_shardings(mesh, shapes)
    return {name: put_rows(value, own, rows, shardings[name]) for name, value in arrays.items()}
