"""What a run would read, counted and shown before it is trained: `emu-jax inspect-data`.

In: a config whose task packs documents. Out: tables as text, with one line of advice; on request a page
(`rows_page.py`) that shows packed rows in a readable form.
"""

from __future__ import annotations

import json

from ml_collections import ConfigDict

from emu_jax.data.config import DataConfig
from emu_jax.data.prepared import Records
from emu_jax.errors import UserError
from emu_jax.inspect.rows_page import draw_page
from emu_jax.inspect.survey import Survey, Table, survey
from emu_jax.storage import Path, as_path, is_bucket, replace_text
from emu_jax.train.tasks.task import find_task


def inspect(
    config: ConfigDict,
    out: Path | None,
    *,
    rows: int,
    batches: int,
    verify: bool,
    counts: Path | None = None,
) -> str:
    """Reads the first `batches` batches of a run, and describes what they hold.

    Args:
      out: HTML file to write: histograms, and the first `rows` packed rows.
      verify: first compare every file of prepared folders with its digest.
      counts: JSON file to write: the counts (`Survey.counts`).

    Raises:
      UserError: the config or its data cannot be read, a file is damaged, or the page cannot be written.
    """
    documents = find_task(config.get("objective", None)).documents(config)
    if documents is None:
        raise UserError(
            f"config.objective={config.objective!r}: inspect-data shows packed documents; expected a config that is "
            "trained on some, such as configs/quickstart.py"
        )
    if batches < 1 or rows < 0:
        raise UserError(f"batches={batches}, rows={rows}; expected at least 1 batch, and 0 rows or more")
    for name, file, what in (("out", out, "an HTML"), ("counts", counts, "a JSON")):
        if file is not None and (file.is_dir() or not (is_bucket(file) or file.parent.is_dir())):
            found = "is a folder" if file.is_dir() else f"there is no folder {file.parent}"
            raise UserError(f"{name}={file}: {found}; name {what} file in a folder that exists")
    verified = _verify(documents.data, documents.image_size) if verify else []
    found = survey(documents, batches=batches, rows=0 if out is None else rows)
    lines = [*verified, *([""] if verified else []), describe(found)]
    if counts is not None:
        _write("counts", counts, json.dumps(found.counts(), indent=2) + "\n")
    if out is not None:
        _write("out", out, draw_page(found))
        lines += ["", f"{out}: {len(found.rows)} rows"]
    return "\n".join(lines)


def _write(name: str, file: Path, text: str) -> None:
    try:
        replace_text(file, text)
    except OSError as error:
        raise UserError(f"{name}={file}: cannot be written ({error.strerror}); name a file elsewhere") from error


def _verify(data: DataConfig, image_size: int) -> list[str]:
    """A line for every source: its files are intact, or have no digests."""
    data.open(image_size)  # raises for a source that is missing
    lines = []
    for name, entry in data.sources.items():
        path = as_path(entry.source)
        if path.is_dir():
            records = Records(path, entry.split)
            records.verify()
            files = len(records.manifest["splits"][entry.split]["files"])
            lines.append(f"{name}: every file's digest is the manifest's ({files:,})")
        else:
            lines.append(f"{name}: no prepared folder, nothing to compare with")
    return lines


def describe(found: Survey) -> str:
    """The survey as text."""
    remarks = found.remarks()
    width = max(len(name) for name, _ in remarks)
    return "\n\n".join(
        [
            found.title,
            _aligned(found.source_table()),
            _aligned(found.document_table()),
            "\n".join(f"{name:{width}}  {text}" for name, text in remarks),
        ]
    )


def _aligned(table: Table) -> str:
    """A table as text; the first column is aligned left, the others right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join(
        "  ".join(
            f"{cell:{'>' if column else '<'}{width}}"
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in table
    )
