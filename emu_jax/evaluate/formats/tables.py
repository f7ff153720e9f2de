"""CSV files as checked entries, one a row."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from emu_jax.errors import UserError
from emu_jax.evaluate.formats.files import Entry
from emu_jax.storage import Path


def read_table(path: Path, columns: Sequence[str]) -> list[Entry]:
    """The rows of a CSV with a header that has `columns`; a row's place is its line.

    Raises:
      UserError: the file is no CSV, a column is missing, or a row has fewer or more cells than the header.
    """
    rows = []
    try:
        reader = csv.DictReader(io.StringIO(path.read_bytes().decode("utf-8-sig"), newline=""))
        if missing := [name for name in columns if name not in (reader.fieldnames or ())]:
            raise UserError(f"{path}: no column {', '.join(missing)}; expected {', '.join(columns)}")
        for fields in reader:
            if None in fields or None in fields.values():
                count = len(reader.fieldnames or ())
                raise UserError(
                    f"{path}: line {reader.line_num} does not have the {count} cells of the header; "
                    "expected the file as it is published, so fetch it again"
                )
            rows.append(Entry(fields, path, f"line {reader.line_num}"))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read ({error}); expected a CSV of {', '.join(columns)}") from error
    if not rows:
        raise UserError(f"{path}: no rows; expected a CSV of {', '.join(columns)}")
    return rows
