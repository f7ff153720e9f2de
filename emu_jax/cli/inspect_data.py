"""`emu-jax inspect-data`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from emu_jax.cli.options import CONFIG_HELP, path

ABOUT = "Count what a run would read, and show packed rows on a page."
EXAMPLE = "emu-jax inspect-data --config configs/mixture.py --out rows.html"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, help=CONFIG_HELP)
    parser.add_argument("--out", type=path, metavar="PAGE.html", help="write a page of histograms and packed rows")
    parser.add_argument("--json", type=path, metavar="FILE.json", help="write the counts")
    parser.add_argument("--rows", type=int, default=12, help="packed rows on the page")
    parser.add_argument("--batches", type=int, default=64, help="batches to count")
    parser.add_argument("--verify", action="store_true", help="read every file completely and compare its digest")


def run(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    from emu_jax.config import load_config
    from emu_jax.inspect.data import inspect

    config = load_config(options.config, overrides)
    settings = {"rows": options.rows, "batches": options.batches, "verify": options.verify, "counts": options.json}
    print(inspect(config, options.out, **settings))
    return 0
