"""Batches of one size."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

Item = TypeVar("Item")


def pad_to(items: Sequence[Item], count: int) -> list[Item]:
    """Repeats the last item until there are `count`, so that a last, shorter batch needs no second compilation.

    >>> pad_to(["a", "b"], 4)
    ['a', 'b', 'b', 'b']
    """
    return [*items, *[items[-1]] * (count - len(items))]


def padded_batches(items: Iterable[Item], size: int) -> Iterator[tuple[list[Item], list[Item]]]:
    """Yields each batch of items, and the same batch padded to `size`.

    >>> list(padded_batches("abcde", 3))
    [(['a', 'b', 'c'], ['a', 'b', 'c']), (['d', 'e'], ['d', 'e', 'e'])]
    """
    left = iter(items)
    while batch := list(itertools.islice(left, size)):
        yield batch, pad_to(batch, size)
