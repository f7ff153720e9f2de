"""Batches of one size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

Item = TypeVar("Item")


def pad_to(items: Sequence[Item], count: int) -> list[Item]:
    """Repeats the last item until there are `count`, so that a last, shorter batch needs no second compilation.

    >>> pad_to(["a", "b"], 4)
    ['a', 'b', 'b', 'b']
    """
    return [*items, *[items[-1]] * (count - len(items))]
