"""Tables of a benchmark's folder: CSV, tab-separated values and Parquet -> rows as checked entries.

    read_table("test.csv", ("video", "question")) ─ Entry, whose place is "line 2"
    read_parquet("validation.parquet", ("id", "image_1")) ─ Entry, whose place is "row 0"

Rows are read one after another: images in their cells may be larger than the memory.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence

from emu_jax.errors import UserError
from emu_jax.evaluate.formats.files import Entry
from emu_jax.storage import Path, failed_file

MAX_CELL = 1 << 28  # characters: an image of 200 MB in base64
PARQUET_ROWS = 16  # in memory at once
AGAIN = "expected the file as it is published, so fetch it again"


def read_table(path: Path, columns: Sequence[str], *, separator: str = ",") -> Iterator[Entry]:
    """The rows of a table of texts with a header that has `columns`; a row's place is its last line.

    Raises:
      UserError: the file is no such table, a column is missing, there are no rows, or a row has fewer or more cells
        than the header.
    """
    kind = "a CSV" if separator == "," else "tab-separated values"
    limit = csv.field_size_limit(MAX_CELL)
    try:
        with path.open("rb") as file, io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as text:
            reader = csv.DictReader(text, delimiter=separator, strict=True)  # or an open quote would join rows
            if missing := [name for name in columns if name not in (reader.fieldnames or ())]:
                if why := failed_file(path):
                    raise UserError(f"{path}: {why}")
                raise UserError(f"{path}: no column {', '.join(missing)}; expected {', '.join(columns)}")
            empty = True
            for fields in reader:
                if None in fields or None in fields.values():
                    count = len(reader.fieldnames or ())
                    raise UserError(
                        f"{path}: line {reader.line_num} does not have the {count} cells of the header; {AGAIN}"
                    )
                empty = False
                yield Entry(fields, path, f"line {reader.line_num}")
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read ({error}); expected {kind} of {', '.join(columns)}") from error
    finally:
        csv.field_size_limit(limit)
    if empty:
        raise UserError(f"{path}: no rows; expected {kind} of {', '.join(columns)}")


def read_parquet(path: Path, columns: Sequence[str]) -> Iterator[Entry]:
    """The rows of a Parquet file, with `columns` alone; a row's place is its number, from 0.

    Raises:
      UserError: the file is not Parquet, a column is missing, or pyarrow is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"{path}: Parquet needs pyarrow; run `pip install 'emu-jax[prepare]'`") from error
    try:
        with path.open("rb") as data, pyarrow.parquet.ParquetFile(data) as file:
            names = file.schema_arrow.names
            if missing := [name for name in columns if name not in names]:
                raise UserError(f"{path}: no column {', '.join(missing)}; expected {', '.join(columns)}")
            number = 0
            for batch in file.iter_batches(batch_size=PARQUET_ROWS, columns=list(columns)):
                for fields in batch.to_pylist():
                    yield Entry(fields, path, f"row {number}")
                    number += 1
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        if why := failed_file(path):
            raise UserError(f"{path}: {why}") from error
        detail = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: cannot be read ({detail}); {AGAIN}") from error
