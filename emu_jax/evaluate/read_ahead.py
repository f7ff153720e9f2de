"""Items that threads read before they are needed."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
READERS = 4  # threads


def read_ahead(read: Callable[[Item], Result], items: Iterable[Item], count: int) -> Iterator[Result]:
    """`map(read, items)` by threads, which read up to `count` items ahead.

    >>> list(read_ahead(str.upper, "abc", 2))
    ['A', 'B', 'C']
    """
    with ThreadPoolExecutor(READERS) as threads:
        ahead: collections.deque[Future[Result]] = collections.deque()
        coming = iter(items)
        try:
            while True:
                while len(ahead) < count:
                    try:
                        ahead.append(threads.submit(read, next(coming)))
                    except StopIteration:
                        break
                if not ahead:
                    return
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()
