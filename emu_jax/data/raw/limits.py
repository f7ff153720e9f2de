"""The beginnings of raw files: their first records, for a trial.

    shards ─ by_file ─ [a.jsonl@0-100, a.jsonl@100-180], [b.tar] ─ read_first(limit) ─ RawDocument | Reject

A record is a document, or a whole document that is left out. What a reader says about a file when it has read all of
it, such as `count_differs`, is not said about a beginning.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator, Sequence

from emu_jax.data.raw.reader import RawDocument, Reader, Reject

PIECE = re.compile(r"@[\d:/+-]+$")  # ends a shard that is a piece of a file; see `Reader.shards`


def by_file(shards: Sequence[str]) -> list[tuple[str, ...]]:
    """The shards of each file, in their order; an HTML page's file is its folder.

    >>> by_file(["a.jsonl@0-100", "a.jsonl@100-180", "b.tar", "c//pages@0-9"])
    [('a.jsonl@0-100', 'a.jsonl@100-180'), ('b.tar',), ('c//pages@0-9',)]
    """
    files: dict[str, list[str]] = {}
    for shard in shards:
        files.setdefault(PIECE.sub("", shard), []).append(shard)
    return [tuple(pieces) for pieces in files.values()]


def read_first(reader: Reader, pieces: Sequence[str], limit: int) -> Iterator[RawDocument | Reject]:
    """What a reader yields for a file's shards, up to its first `limit` records; all of it with 0."""
    left = limit or -1
    for shard in pieces:
        found = reader.read(shard)
        try:
            for one in found:
                yield one
                if isinstance(one, RawDocument) or one.whole:
                    left -= 1
                    if not left:
                        return
        finally:
            if isinstance(found, Generator):  # which then closes its file
                found.close()
