"""Random access to the records of many ArrayRecord files, many records at a time.

In: files whose numbers of records are known, and indices into all of them. Out: the records' bytes. A file is opened
when one of its records is first read, and at most `OPEN_FILES` are open in a process: a shuffled pass over 6,000 files
needs neither 6,000 handles nor 6,000 files opened at start.
"""

from __future__ import annotations

import bisect
import collections
import functools
import itertools
import os
import re
import resource
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, Protocol

from array_record.python.array_record_module import ArrayRecordReader

from emu_jax.errors import TransientError, UserError
from emu_jax.storage import Path, as_path, is_bucket

THREADS = 32  # of a process, for reading: file shares and buckets take 2 to 50 ms a record, whatever its size
PIECE = 8  # records of a file that one thread reads
OPEN_FILES = 4096  # an open file holds its index in memory, 8 bytes a record
HANDLES = 2  # of a file
HELD_BYTES = 2 << 30  # records of files in buckets that a process keeps on its local disk
MOST_HANDLES = 1 << 16  # where the hard limit is far above, programs that close every possible handle take long
# Errors of file shares that pass, as the operating system words them in ArrayRecord's messages.
_PASSING = re.compile(
    r"\w+\(\) failed: (Input/output error|Stale file handle|Connection timed out|Transport endpoint is not connected)"
)
READER: dict[str, str | int] = {  # for random access
    "options": "readahead_buffer_size:0,max_parallelism:0",
    "file_reader_buffer_size": 1 << 15,
}

Piece = tuple[int, Sequence[int]]  # a file's number, and positions in it


class RecordFile(NamedTuple):
    """An ArrayRecord file, how many records it holds, and its size in bytes."""

    path: Path
    records: int
    size: int


class RecordFiles:
    """The records of files, one after another, by index."""

    def __init__(self, files: Iterable[RecordFile]):
        self._files = list(files)
        self._ends = list(itertools.accumulate(file.records for file in self._files))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def file_of(self, index: int) -> tuple[Path, int]:
        """The file that holds a record, and the record's position in it."""
        number, position = self._place(index)
        return self._files[number].path, position

    def read(self, indices: Sequence[int]) -> list[bytes]:
        """The records at `indices`, in their order.

        Raises:
          UserError: a file is missing or damaged.
        """
        wanted: dict[int, dict[int, None]] = {}  # file -> positions, without repetitions
        places = [self._place(index) for index in indices]
        for number, position in sorted(places):
            wanted.setdefault(number, {})[position] = None
        pieces = [
            (number, list(positions)[first : first + PIECE])
            for number, positions in wanted.items()
            for first in range(0, len(positions), PIECE)
        ]
        found: dict[tuple[int, int], bytes] = {}
        for (number, piece), records in zip(pieces, _in_threads(self._read_piece, pieces), strict=True):
            found.update(zip(((number, position) for position in piece), records, strict=True))
        return [found[place] for place in places]

    def _place(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        number = bisect.bisect_right(self._ends, index)
        return number, index - (self._ends[number] - self._files[number].records)

    def _read_piece(self, piece: Piece) -> list[bytes]:
        number, positions = piece
        file = self._files[number]
        try:
            return _open_files(os.getpid()).read(file, positions)
        except TransientError:
            raise
        except (RuntimeError, ValueError, IndexError, FileNotFoundError) as error:  # the first is of ArrayRecord's C++
            raise _reason(file.path, str(error).partition("\n")[0][:120]) from error


def _reason(path: Path, error: str) -> Exception:
    if _PASSING.search(error):
        return TransientError(f"{path}: cannot be read now ({error}); start the command again to resume")
    return UserError(f"{path}: damaged ({error}); copy it again or prepare the data again")


class Reader(Protocol):
    """An open file; any number of threads may use it at once."""

    def ok(self) -> bool: ...

    def num_records(self) -> int: ...

    def read(self, positions: Sequence[int]) -> list[bytes]: ...


class _OpenFiles:
    """The open files of a process; those that were used least recently are closed when there are too many.

    A reader that is still in use then closes its file when the last thread has its records.
    """

    def __init__(self, most: int):
        self._most, self._lock = most, threading.Lock()
        self._readers: collections.OrderedDict[Path, Reader] = collections.OrderedDict()
        self._held: collections.Counter[Path] = collections.Counter()  # bytes of records that a reader has fetched

    def read(self, file: RecordFile, positions: Sequence[int]) -> list[bytes]:
        with self._lock:
            reader = self._readers.get(file.path)
        if reader is None:
            reader = _open(file)  # outside of the lock: it waits for storage
        records = reader.read(positions)
        with self._lock:
            self._readers.setdefault(file.path, reader)
            self._readers.move_to_end(file.path)
            if is_bucket(file.path):
                self._held[file.path] += sum(map(len, records))
            while len(self._readers) > self._most or self._held.total() > HELD_BYTES:
                path, _ = self._readers.popitem(last=False)
                del self._held[path]
        return records


def _open(file: RecordFile) -> Reader:
    reader: Reader
    if is_bucket(file.path):
        from emu_jax.data.bucket_records import BucketReader  # on demand: its packages are an extra

        reader = BucketReader(as_path(file.path), file.size, READER)  # a process for input has no file systems yet
    else:
        reader = ArrayRecordReader(str(file.path), **READER)
    found = reader.num_records() if reader.ok() else None
    if found is None:
        reader.read([0])  # raises the reason
    if found != file.records:
        raise ValueError(f"{found} records, its manifest states {file.records}")
    return reader


@functools.cache
def _open_files(process: int) -> _OpenFiles:
    """The readers of this process: a forked one must not share the handles of its parent."""
    return _OpenFiles(min(OPEN_FILES, raise_file_limit() // (2 * HANDLES)))


@functools.cache
def _threads(process: int) -> ThreadPoolExecutor:
    """The threads of this process: a forked one has none of its parent's."""
    return ThreadPoolExecutor(THREADS, thread_name_prefix="records")


def _in_threads(function: Callable[[Piece], list[bytes]], pieces: Sequence[Piece]) -> list[list[bytes]]:
    """`function` of every piece, in order; on this thread if there is only one."""
    if len(pieces) < 2:
        return [function(piece) for piece in pieces]
    return list(_threads(os.getpid()).map(function, pieces))


def raise_file_limit() -> int:
    """Raises this process's limit of open files as far as it may; returns the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MOST_HANDLES if hard == resource.RLIM_INFINITY else min(hard, MOST_HANDLES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        return most
    return MOST_HANDLES if soft == resource.RLIM_INFINITY else soft
