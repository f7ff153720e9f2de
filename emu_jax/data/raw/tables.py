"""Tables with nested columns, in Parquet or Arrow, a few rows at a time.

    part.parquet, data-00000-of-00002.arrow ─ open_table ─ Table ─ batches ─ rows_of ─ {"image": {…}, …} | Skip

Arrow is the stream format, which `datasets` saves and caches, or the file format (Feather). It is mapped into memory,
so that a batch of a thousand images takes no more than the few that are read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

from emu_jax.data.raw.files import Skip, opened, shard_name
from emu_jax.errors import UserError

SUFFIXES = (".parquet", ".arrow")
FILE_MAGIC = b"ARROW1"
END = b"\xff\xff\xff\xff\0\0\0\0"  # of an Arrow stream


@dataclasses.dataclass(frozen=True)
class Table:
    """An open table.

    Attributes:
      schema: pyarrow's schema of its columns.
    """

    schema: Any
    _batches: Any

    def batches(self, rows: int, columns: Sequence[str] | None = None) -> Iterator[Any]:
        """Record batches of at most `rows` rows, with some of the columns or all.

        Raises:
          Skip: `cut_shard` where the table cannot be read further.
        """
        import pyarrow

        try:
            yield from self._batches(rows, columns)
        except (OSError, pyarrow.ArrowException) as error:
            raise Skip("cut_shard", f"the file cannot be read further ({_one_line(error)})") from error


@contextlib.contextmanager
def open_table(shard: str) -> Iterator[Table]:
    """Opens a shard whose name ends in one of `SUFFIXES`.

    Raises:
      Skip: `cut_shard` if it is no complete table.
      UserError: pyarrow is missing.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UserError(f"{shard}: reading tables needs pyarrow; run `pip install 'emu-jax[prepare]'`") from error
    arrow = shard.endswith(".arrow")
    with contextlib.ExitStack() as stack:
        data = stack.enter_context(opened(shard))
        try:
            if arrow:
                table = _arrow(data, stack.enter_context(pyarrow.memory_map(data.name)))
            else:
                file = stack.enter_context(
                    parquet.ParquetFile(data, buffer_size=1 << 20, page_checksum_verification=True)
                )
                table = Table(
                    file.schema_arrow,
                    lambda rows, columns: file.iter_batches(rows, columns=columns, use_threads=False),
                )
        except (OSError, pyarrow.ArrowException) as error:
            what = "Arrow" if arrow else "Parquet"
            raise Skip("cut_shard", f"{shard_name(shard)} is no complete {what} file ({_one_line(error)})") from error
        _check_names(table.schema, shard)
        yield table


def _check_names(schema: Any, shard: str) -> None:
    try:
        names = list(schema.names)
    except UnicodeDecodeError as error:
        raise Skip("cut_shard", f"{shard_name(shard)}: the name of a column is not UTF-8") from error
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise Skip("cut_shard", f"{shard_name(shard)}: two columns are called {ascii(twice)[:80]}")


def _arrow(data: BinaryIO, mapped: Any) -> Table:
    import pyarrow

    stream = data.read(len(FILE_MAGIC)) != FILE_MAGIC
    reader = pyarrow.ipc.open_stream(mapped) if stream else pyarrow.ipc.open_file(mapped)

    def batches(rows: int, columns: Sequence[str] | None) -> Iterator[Any]:
        found = reader if stream else map(reader.get_batch, range(reader.num_record_batches))
        for batch in found:
            batch = batch if columns is None else batch.select(list(columns))
            for column in batch.columns:
                _check(column)
            yield from (batch.slice(start, rows) for start in range(0, batch.num_rows, rows))
        if stream:
            data.seek(-min(len(END), os.fstat(data.fileno()).st_size), os.SEEK_END)
            if data.read() != END:  # where a stream is cut between two batches, the reader does not notice
                raise pyarrow.ArrowInvalid("the stream has no end mark")

    return Table(reader.schema, batches)


def _check(column: Any) -> None:
    """Raises ArrowException if lengths or offsets lead out of the column; `rows_of` tells which text is not UTF-8."""
    import pyarrow

    binary = {pyarrow.string(): pyarrow.binary(), pyarrow.large_string(): pyarrow.large_binary()}
    (column.view(binary[column.type]) if column.type in binary else column).validate(full=True)


def rows_of(batch: Any) -> Iterator[dict[str, Any] | Skip]:
    """The rows of a record batch, each as an object, or why it cannot be read."""
    for number in range(batch.num_rows):
        try:
            yield batch.slice(number, 1).to_pylist()[0]
        except UnicodeDecodeError as error:
            yield Skip("unreadable_text", f"a text is not UTF-8 ({error.reason} at byte {error.start})")
        except ValueError as error:  # such as a time that Python cannot hold, or two fields of one name
            yield Skip("unreadable_record", f"the row cannot be read ({_one_line(error)})")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
