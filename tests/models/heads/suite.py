"""A head of the registry at a small width, as a tree of parameters and a function that applies it."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from emu_jax.models.heads.head import HeadLoss, VisualHead
from emu_jax.models.heads.registry import build_head

WIDTH = 16
SETTINGS: dict[str, dict[str, Any]] = {"codes": {"codes": 64, "groups": 4}}  # where the default suits larger widths


def made(name: str, **settings: Any) -> tuple[VisualHead, Any, Callable]:
    """The head, its parameters, and (parameters, function of the module) -> the function's result."""
    head = build_head("model.visual_head", {"name": name, **SETTINGS.get(name, {}), **settings})
    graph, params = nnx.split(head.make(nnx.Rngs(0), WIDTH, "float32", "scaled"))
    return head, params, lambda params, use: use(nnx.merge(graph, params))


def loss_of(
    head: VisualHead,
    apply: Callable,
    params: Any,
    hidden: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    key: jax.Array | None = None,
) -> HeadLoss:
    key = jax.random.key(0) if key is None else key
    arguments = (
        params,
        hidden,
        targets,
        weights,
        key,
    )  # one program: op by op, a network of three blocks takes seconds
    return jax.jit(lambda params, *rest: apply(params, lambda module: head.loss(module, *rest)))(*arguments)
