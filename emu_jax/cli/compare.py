"""`emu-jax compare`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from emu_jax.cli.options import path

ABOUT = "Compare runs in one table and one plot; runs that differ only in their seed form a group."
EXAMPLE = "emu-jax compare runs/base-0 runs/base-1 runs/other-0 runs/other-1 --out runs/comparison"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs", nargs="+", type=path, metavar="RUN", help="training work directories; the first one is the base"
    )
    parser.add_argument("--out", type=path, default="comparison", help="folder for compare.json and compare.png")
    parser.add_argument(
        "--figures", nargs="+", default=[], metavar="NAME", help="names in scores.json, or 'last text_loss'"
    )
    parser.add_argument("--markdown", action="store_true", help="also write compare.md")


def run(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    from emu_jax.evaluate.compare import compare, table, write

    comparison = compare(options.runs, options.figures)
    files = write(comparison, options.out, markdown=options.markdown)
    print(table(comparison))
    print(*files, sep="\n")
    return 0
