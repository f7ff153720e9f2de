"""Reports everything in a file that does not fit our parameters."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Fault:
    """One misfit: its kind (missing, unknown, …), the key or path, and what is wrong with it."""

    kind: str
    name: str
    detail: str = ""

    @property
    def text(self) -> str:
        return self.name + (f" ({self.detail})" if self.detail else "")

    def __str__(self) -> str:
        return f"{self.kind}: {self.text}"


def report(where: str, faults: Sequence[Fault], layout: str) -> str:
    """A summary, and a line for every fault; a single fault follows on the same line."""
    counts = ", ".join(f"{count} {kind}" for kind, count in Counter(f.kind for f in faults).items())
    summary = f"{where}: does not fit {layout}, nothing was loaded: {counts}"
    return f"{summary}: {faults[0].text}" if len(faults) == 1 else "\n  ".join([summary, *map(str, faults)])
