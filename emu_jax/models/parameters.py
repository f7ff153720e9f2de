"""Parameters of a model as plain nested dicts: their initial values, shapes, logical axes, and the module over them.

A model is a Flax module that `module(rngs, config)` builds from a hashable config. Models wrap these functions with
their own module and config (`emu.init(config, key)`, …).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import jax
from flax import nnx

Params = dict[str, Any]  # nested dict of arrays
Module = TypeVar("Module", bound=nnx.Module)


@functools.lru_cache(maxsize=32)
def _template(module: Callable[[nnx.Rngs, Any], nnx.Module], config: Hashable) -> tuple[nnx.GraphDef, nnx.State]:
    return nnx.split(nnx.eval_shape(lambda: module(nnx.Rngs(params=0), config)))


def init(module: Callable[[nnx.Rngs, Any], nnx.Module], config: Hashable, key: jax.Array) -> Params:
    """Initial parameters, drawn from `key`. Jit it with `out_shardings` to create them sharded."""
    return nnx.to_pure_dict(nnx.state(module(nnx.Rngs(params=key), config)))


def abstract(module: Callable[[nnx.Rngs, Any], nnx.Module], config: Hashable) -> Params:
    """The parameter tree as `ShapeDtypeStruct`s; allocates nothing."""
    return nnx.to_pure_dict(_template(module, config)[1])


def logical_axes(module: Callable[[nnx.Rngs, Any], nnx.Module], config: Hashable) -> dict[str, Any]:
    """The parameter tree with a tuple of logical axis names at every leaf; stacked layers add "layers"."""
    tree: dict[Any, Any] = {}
    for path, variable in nnx.to_flat_state(_template(module, config)[1]):
        node = tree
        for part in path[:-1]:
            node = node.setdefault(part, {})
        stacked = len(variable.shape) - len(variable.axes)
        node[path[-1]] = ("layers",) * stacked + tuple(variable.axes)
    return tree


def bind(module: Callable[[nnx.Rngs, Any], Module], config: Hashable, params: Params) -> Module:
    """The module over these parameters; costs nothing at run time when called while tracing."""
    return nnx.merge(_template(module, config)[0], params)
