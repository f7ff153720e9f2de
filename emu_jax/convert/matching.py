"""Parameters by path, and a report of everything in a file that does not fit them."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Fault:
    """One thing that does not fit: `kind` (missing, unknown, …), the key or path, what is wrong with it."""

    kind: str
    name: str
    detail: str = ""

    @property
    def text(self) -> str:
        return self.name + (f" ({self.detail})" if self.detail else "")

    def __str__(self) -> str:
        return f"{self.kind}: {self.text}"


def report(where: str, faults: Sequence[Fault], layout: str) -> str:
    """A summary, then every fault in a line of its own; a single one follows in the same line."""
    counts = ", ".join(f"{count} {kind}" for kind, count in Counter(f.kind for f in faults).items())
    summary = f"{where}: does not fit {layout}, nothing was loaded: {counts}"
    return f"{summary}: {faults[0].text}" if len(faults) == 1 else "\n  ".join([summary, *map(str, faults)])


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": leaf}} -> {"a/b": leaf}."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= flatten(value, f"{prefix}{name}/") if isinstance(value, Mapping) else {prefix + name: value}
    return flat


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """{"a/b": leaf} -> {"a": {"b": leaf}}."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *folders, name = path.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[name] = value
    return tree
