"""Nested dicts of parameters and flat dicts by path: {"a": {"b": leaf}} <-> {"a/b": leaf}."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": leaf}} -> {"a/b": leaf}.

    >>> flatten({"a": {"b": 1}, "c": 2})
    {'a/b': 1, 'c': 2}
    """
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= flatten(value, f"{prefix}{name}/") if isinstance(value, Mapping) else {prefix + name: value}
    return flat


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """{"a/b": leaf} -> {"a": {"b": leaf}}.

    >>> nest({"a/b": 1, "c": 2})
    {'a': {'b': 1}, 'c': 2}
    """
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *folders, name = path.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[name] = value
    return tree


def split(tree: Mapping[str, Any], chosen: Callable[[str], bool]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Two trees: the leaves whose paths are chosen, and all others; `join` is the inverse.

    >>> split({"a": {"b": 1, "c": 2}}, lambda path: path == "a/b")
    ({'a': {'b': 1}}, {'a': {'c': 2}})
    """
    flat = flatten(tree)
    picked = {path: leaf for path, leaf in flat.items() if chosen(path)}
    return nest(picked), nest({path: leaf for path, leaf in flat.items() if path not in picked})


def join(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """One tree with the leaves of both."""
    return nest(flatten(one) | flatten(other))
