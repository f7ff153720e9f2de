"""`emu-jax prepare`."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from emu_jax.cli.options import path
from emu_jax.data.raw.readers import READERS
from emu_jax.errors import UserError
from emu_jax.storage import absolute

if TYPE_CHECKING:
    from emu_jax.data.images import Recoding
    from emu_jax.data.summary import Summary

ABOUT = "Turn raw data into records once, for training to stream."
EXAMPLE = "emu-jax prepare pairs --in laion-coco --out data/laion_coco --workers 8"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help=f"reader of the raw data: {', '.join(READERS)}")
    parser.add_argument(
        "--in",
        dest="path",
        required=True,
        help="file, folder or glob of raw data; tars, Parquet and JSONL that hold all may be in a bucket",
    )
    parser.add_argument(
        "--out", type=path, help="a new folder or place in a bucket, which all workers see; not needed for --dry-run"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="read the first records (1,000 in all, or --limit of each file), report what would be left out and why, "
        "and write nothing",
    )
    parser.add_argument(
        "--limit", type=int, metavar="N", help="read the first N records of each raw file only; the manifest says so"
    )
    parser.add_argument("--set", nargs="+", default=[], metavar="FIELD=VALUE", help="settings of the reader")
    parser.add_argument("--name", help="name of the data set (default: the folder's)")
    parser.add_argument("--split", default="train")
    parser.add_argument("--shards", type=int, default=0, help="number of files (default: files of about 256 MB)")
    parser.add_argument("--image-size", type=int, default=224, help="side in pixels that models will read")
    parser.add_argument("--quality", type=int, default=90, help="JPEG quality of the stored images")
    parser.add_argument("--min-side", type=int, default=32, help="leave out images with a shorter side, in pixels")
    parser.add_argument("--max-aspect", type=float, default=4.0, help="leave out images of a larger aspect ratio")
    parser.add_argument(
        "--fit", default="squash", help="how images become square: squash, as the reference does, crop, or pad on white"
    )
    parser.add_argument("--max-faults", type=float, default=0.02, help="stop at this share of faulty documents")
    parser.add_argument("--workers", type=int, default=1, help="processes of the local runner")
    parser.add_argument("--runner", default="DirectRunner", help="Beam runner: DirectRunner, DataflowRunner, …")
    parser.add_argument("--beam", default="", metavar="ARGUMENTS", help="more arguments for Beam, in one string")


def run(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    from emu_jax.data.images import Recoding
    from emu_jax.data.prepare import PrepareConfig, prepare
    from emu_jax.data.raw.readers import make_reader
    from emu_jax.data.summary import Refused, Summary

    if options.limit is not None and options.limit < 1:
        raise UserError(f"--limit {options.limit}: expected 1 or more records; without it, all are read")
    fields = ("image_size", "quality", "min_side", "max_aspect", "fit")
    recoding = Recoding(**{name: getattr(options, name) for name in fields})
    try:
        if options.dry_run:
            _dry_run(options, recoding)
            return 0
        if options.out is None:
            raise UserError("--out is missing: name a new folder for the records, or add --dry-run to write nothing")
        config = PrepareConfig(
            name=options.name or re.sub(r"\W", "_", absolute(options.out).name),
            recoding=recoding,
            limit=options.limit or 0,
            **{name: getattr(options, name) for name in ("split", "shards", "max_faults", "runner", "workers", "beam")},
        )
        manifest = prepare(make_reader(options.source, options.set), options.source, options.path, options.out, config)
    except Refused as refused:
        _print(refused.summary)
        raise
    split = manifest["splits"][options.split]
    size = sum(file["bytes"] for file in split["files"].values())
    limited = f", from the first {config.limit:,} records of each file" if config.limit else ""
    print(
        f"{options.out}: {split['records']:,} documents in {len(split['files'])} files, {size / 1e6:,.1f} MB{limited}"
    )
    _print(Summary.from_json(manifest))
    return 0


def _dry_run(options: argparse.Namespace, recoding: Recoding) -> None:
    from emu_jax.data.dry_run import dry_run
    from emu_jax.data.prepare import check_max_faults
    from emu_jax.data.raw.readers import make_reader

    check_max_faults(options.max_faults)
    found = dry_run(make_reader(options.source, options.set), options.path, recoding, options.limit or 0)
    summary = found.summary
    files = (
        f"{found.files:,} of {found.all_files:,} files" if found.files < found.all_files else f"{found.files:,} files"
    )
    print(f"dry run: at most {found.limit:,} records of each of {files}; nothing is written")
    print(f"{summary.documents:,} documents: {summary.records:,} would be kept, {summary.faults:,} faults")
    summary.check(options.max_faults, options.source, "")
    _print(summary)


def _print(summary: Summary) -> None:
    print("\n".join(summary.lines()))
