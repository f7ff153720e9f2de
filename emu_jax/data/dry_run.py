"""`emu-jax prepare --dry-run`: what a preparation would keep and leave out, from the first records of raw files.

    shards ─ by_file ─ some of the files ─ read_first ─ recode ─ without_duplicates ─ Summary

The steps are those of `prepare.py`, in this process and in memory, without Beam. Nothing is written.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import itertools
from collections.abc import Iterator, Sequence

from emu_jax.data.document import Text
from emu_jax.data.images import Recoding
from emu_jax.data.kinds import KINDS
from emu_jax.data.prepare import later_ones, occurrences, recode, without_duplicates
from emu_jax.data.prepared import Record, StoredImage
from emu_jax.data.raw.limits import by_file, read_first
from emu_jax.data.raw.reader import Reader, Reject
from emu_jax.data.summary import Summary, count_rejects
from emu_jax.errors import UserError

RECORDS = 1_000  # of all files together, without a limit
VIDEOS = 50  # of which each takes as long as dozens of images


@dataclasses.dataclass(frozen=True)
class DryRun:
    """The result.

    Attributes:
      limit: how many records of each file were read, at most.
      files, all_files: number of files that were read, and that there are.
    """

    summary: Summary
    limit: int
    files: int
    all_files: int


def dry_run(reader: Reader, path: str, recoding: Recoding, limit: int = 0) -> DryRun:
    """Reads the first records of the files at `path`.

    Args:
      limit: number of records of each file; 0 spreads `RECORDS` over the files (`VIDEOS` where documents are videos).

    Raises:
      UserError: there is nothing to read.
    """
    if limit < 0:
        raise UserError(f"limit {limit}; expected 1 or more")
    files = by_file(reader.shards(path))
    read = files
    if not limit:
        some = VIDEOS if KINDS[reader.kind].one_video else RECORDS
        read = [files[number * len(files) // some] for number in range(some)] if len(files) > some else files
        limit = some // len(read)
    records, rejects = _checked(_recoded(reader, read, limit, recoding))
    return DryRun(Summary(records, dict(sorted(count_rejects(rejects).items()))), limit, len(read), len(files))


def _recoded(
    reader: Reader, files: Sequence[Sequence[str]], limit: int, recoding: Recoding
) -> Iterator[Record | Reject]:
    """Records, with the digests of images in their place, which are as equal and small enough to keep."""
    for found in itertools.chain.from_iterable(read_first(reader, pieces, limit) for pieces in files):
        for one in [found] if isinstance(found, Reject) else recode(found, recoding):
            yield one if isinstance(one, Reject) else dataclasses.replace(one, parts=tuple(map(_digested, one.parts)))


def _digested(part: Text | StoredImage) -> Text | StoredImage:
    return StoredImage(hashlib.sha256(part.data).digest()) if isinstance(part, StoredImage) else part


def _checked(found: Iterator[Record | Reject]) -> tuple[int, list[Reject]]:
    """The number of records without duplicates, and all rejects; grouped as the pipeline of `prepare.py` does."""
    rejects: list[Reject] = []
    records = collections.defaultdict(list)
    same = collections.defaultdict(list)
    for one in found:
        if isinstance(one, Reject):
            rejects.append(one)
            continue
        records[one.key].append(one)
        for digest, place in occurrences(one):
            same[digest].append(place)
    duplicates = collections.defaultdict(list)
    for group in same.items():
        for key, later in later_ones(group):
            duplicates[key].append(later)
    kept = 0
    for key, group in records.items():
        for one in without_duplicates((key, {"records": group, "duplicates": duplicates[key]})):
            if isinstance(one, Reject):
                rejects.append(one)
            else:
                kept += 1
    return kept, rejects
