"""Batches of one size, so that one program is compiled."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

Item = TypeVar("Item")


def padded_batches(items: Sequence[Item], size: int) -> Iterator[tuple[list[Item], list[Item]]]:
    """Yields each batch of items, and the same batch padded to `size` with its last item.

    >>> list(padded_batches("abcde", 3))
    [(['a', 'b', 'c'], ['a', 'b', 'c']), (['d', 'e'], ['d', 'e', 'e'])]
    """
    for start in range(0, len(items), size):
        batch = list(items[start : start + size])
        yield batch, batch + [batch[-1]] * (size - len(batch))
