"""A digest of every leaf, uint32: the sum over words of word * odd multiplier of its position, modulo 2^32.

An odd multiplier is invertible, so one changed word always changes the sum; integer sums do not depend on how a leaf is
split over devices. A word is an element, or a half of an 8-byte element. Leaves are digested where they are: those in
the host's memory by NumPy, which compiles nothing, others by one program on their devices.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np


def named_leaves(items: Mapping[str, Any]) -> dict[str, Any]:
    """A tree's leaves by their paths, such as `params/ln_visual/scale`."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in jax.tree.leaves_with_path(items)
    }


def summaries(items: Mapping[str, Any]) -> tuple[dict[str, int], list[str]]:
    """The digest of every leaf, by name, and the names of the leaves that hold a NaN or an infinity."""
    leaves = named_leaves(items)
    elsewhere = {name: leaf for name, leaf in leaves.items() if not on_host(leaf)}
    found = {name: (int(digest), bool(finite)) for name, (digest, finite) in on_devices(elsewhere).items()}
    for name, leaf in leaves.items():
        if name not in elsewhere:
            value = np.asarray(leaf)
            found[name] = digest(value, value.shape), bool(not _has_infinity(value.dtype) or np.isfinite(value).all())
    return {name: found[name][0] for name in leaves}, [name for name in leaves if not found[name][1]]


def digests(items: Mapping[str, Any]) -> dict[str, int]:
    """The digest of every leaf, by name."""
    return summaries(items)[0]


def on_host(leaf: Any) -> bool:
    """Whether a leaf is in the host's memory as one array."""
    if not isinstance(leaf, jax.Array):
        return True
    devices: list[Any] = list(leaf.sharding.device_set)
    return len(devices) == 1 and devices[0].platform == "cpu"


def _has_infinity(dtype: Any) -> bool:
    return bool(jnp.issubdtype(dtype, jnp.inexact))


# ---- by NumPy ------------------------------------------------------------------------------------------------------


def digest(value: np.ndarray, shape: tuple[int, ...], layer: int | None = None) -> int:
    """A leaf's digest, or a layer's share of it; the shares of all layers add up to the digest, modulo 2^32.

    Multipliers grow linearly along every axis, so sums along the other axes are enough, and no array of multipliers is
    needed.

    Args:
      shape: the leaf's.
      layer: the number of the layer that `value` is; None: it is the whole leaf.
    """
    words = _words(value if layer is None else value[None])
    shape = (*shape, *words.shape[len(shape) :])
    steps = [2 * math.prod(2 * size + 1 for size in shape[axis + 1 :]) for axis in range(len(shape))]
    first = math.prod(2 * size + 1 for size in shape)
    if layer is not None:
        first += layer * steps[0]
    total = first * int(words.sum(dtype=np.uint32))
    for axis, step in enumerate(steps):
        others = tuple(a for a in range(words.ndim) if a != axis)
        along = words.sum(axis=others, dtype=np.uint32)
        total += step * int((along * np.arange(len(along), dtype=np.uint32)).sum(dtype=np.uint32))
    return total % 2**32


def _words(value: np.ndarray) -> np.ndarray:
    """The bits of an array as unsigned integers."""
    if value.dtype == ml_dtypes.int4:
        value = value.astype(np.int8)
    unsigned = {1: np.uint8, 2: np.uint16, 4: np.uint32}.get(value.dtype.itemsize)
    if unsigned is None:  # 8 bytes: two words per element, on an axis of their own
        return np.ascontiguousarray(value).view(np.uint32).reshape(*value.shape, 2)
    return value.view(unsigned)


# ---- on devices ----------------------------------------------------------------------------------------------------


def _digest(leaf: jax.Array) -> jax.Array:
    """uint32 []."""
    if leaf.dtype == jnp.bool_:
        leaf = leaf.astype(jnp.uint8)
    if leaf.dtype == jnp.int4:  # a word each: two of them are a byte in memory, but not in NumPy
        leaf = leaf.astype(jnp.int8)
    unsigned = {1: jnp.uint8, 2: jnp.uint16}.get(leaf.dtype.itemsize, jnp.uint32)
    words = jax.lax.bitcast_convert_type(leaf, unsigned).astype(jnp.uint32)
    multiplier = jnp.ones((), jnp.uint32)
    for axis, size in enumerate(words.shape):
        index = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        multiplier = multiplier * jnp.uint32(size * 2 + 1) + index * jnp.uint32(2)
    return jnp.sum(words * (multiplier | jnp.uint32(1)), dtype=jnp.uint32)


def _is_finite(leaf: jax.Array) -> jax.Array:
    """bool []: whether no element is NaN or infinite."""
    return jnp.isfinite(leaf).all() if _has_infinity(leaf.dtype) else jnp.ones((), bool)


# One program for all leaves: hundreds of small ones with collectives starve each other on simulated devices. It reads
# every shard once, where it is, for both results.
_summaries = jax.jit(lambda leaves: jax.tree.map(lambda leaf: (_digest(leaf), _is_finite(leaf)), leaves))


def on_devices(leaves: Mapping[str, jax.Array]) -> dict[str, tuple[Any, Any]]:
    """By name: the digest, and whether all elements are finite."""
    return jax.device_get(_summaries(dict(leaves))) if leaves else {}
