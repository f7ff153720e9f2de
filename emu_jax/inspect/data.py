"""`emu-jax inspect-data`: what a run would read, counted and shown before it is trained.

In: a config of documents (objectives pretrain and instruct). Out: a text of tables, and one line of advice; where a
file is named, a page (`rows_page.py`) that draws packed rows as a person reads them.
"""

from __future__ import annotations

import json
from pathlib import Path

from ml_collections import ConfigDict

from emu_jax.data.pipeline import DataConfig
from emu_jax.data.prepared import Records
from emu_jax.errors import UserError
from emu_jax.inspect.rows_page import draw_page
from emu_jax.inspect.survey import Survey, Table, survey
from emu_jax.train.experiment import make_model_config, make_tokenizer

OBJECTIVES = ("pretrain", "instruct")


def inspect(
    config: ConfigDict,
    out: Path | None,
    *,
    rows: int,
    batches: int,
    verify: bool,
    counts: Path | None = None,
) -> str:
    """Reads `batches` batches of what the config would train on, and tells what they hold.

    Args:
      out: a page of histograms and of the first `rows` packed rows.
      verify: of prepared folders, compare every file with its digest first.
      counts: a JSON file of what was counted (`Survey.counts`).

    Raises:
      UserError: the config or its data cannot be read, a file is damaged, or the page cannot be written.
    """
    kind = config.get("objective", None)
    if kind not in OBJECTIVES:
        raise UserError(
            f"config.objective={kind!r}: inspect-data shows packed documents; expected a config whose objective is "
            f"{' or '.join(OBJECTIVES)}, such as configs/quickstart.py"
        )
    if batches < 1 or rows < 0:
        raise UserError(f"--batches {batches} --rows {rows}; expected at least 1 batch, and 0 rows or more")
    for flag, file, what in (("--out", out, "an HTML"), ("--json", counts, "a JSON")):
        if file is not None and (file.is_dir() or not file.parent.is_dir()):
            found = "is a folder" if file.is_dir() else f"there is no folder {file.parent}"
            raise UserError(f"{flag} {file}: {found}; name {what} file in a folder that exists")
    data = DataConfig.from_dict(config.data)
    verified = _verify(data, config.model.vision.image_size) if verify else []
    tokenizer = make_tokenizer(config, data)
    model = make_model_config(config, tokenizer)
    found = survey(
        data,
        tokenizer,
        queries=model.causal.queries,
        image_size=model.vision.image_size,
        batches=batches,
        rows=0 if out is None else rows,
        learn_image_token=model.learn_image_token,
    )
    lines = [*verified, *([""] if verified else []), describe(found)]
    if counts is not None:
        _write("--json", counts, json.dumps(found.counts(), indent=2) + "\n")
    if out is not None:
        _write("--out", out, draw_page(found))
        lines += ["", f"{out}: {len(found.rows)} rows"]
    return "\n".join(lines)


def _write(flag: str, file: Path, text: str) -> None:
    partial = file.with_name(file.name + ".partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(file)
    except OSError as error:
        raise UserError(f"{flag} {file}: cannot be written ({error.strerror}); name a file elsewhere") from error


def _verify(data: DataConfig, image_size: int) -> list[str]:
    """A line for every source: whole, or nothing to compare with."""
    data.open(image_size)  # names what is missing
    lines = []
    for name, entry in data.sources.items():
        if Path(entry.source).is_dir():
            records = Records(Path(entry.source), entry.split)
            records.verify()
            files = len(records.manifest["splits"][entry.split]["files"])
            lines.append(f"{name}: every file's digest is the manifest's ({files:,})")
        else:
            lines.append(f"{name}: no prepared folder, nothing to compare with")
    return lines


def describe(found: Survey) -> str:
    """The survey as it is printed."""
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
    """Columns of words, then of numbers."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join(
        "  ".join(
            f"{cell:{'>' if place else '<'}{width}}"
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in table
    )
