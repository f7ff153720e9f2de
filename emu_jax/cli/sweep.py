"""`emu-jax sweep`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from emu_jax.cli.options import CONFIG_HELP, path
from emu_jax.errors import EXIT_CRASH, UserError

ABOUT = "Train every combination of some fields' values with several seeds, then compare the runs."
EXAMPLE = (
    "emu-jax sweep --config configs/quickstart.py --out runs/sweep --vary optimizer.ema_decay 0 0.999 "
    "--vary model.regression_loss_weight 1 4 --seeds 0 1 --split heldout_combinations --config.train.steps=1500"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, help=CONFIG_HELP)
    parser.add_argument("--out", required=True, type=path, help="folder with a work directory for each run")
    parser.add_argument(
        "--vary",
        nargs="+",
        action="append",
        default=[],
        metavar=("FIELD", "VALUE"),
        help="a field of the config and its values; given several times, all combinations are trained",
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of each combination (default: 0)")
    parser.add_argument("--split", default="", help="evaluate each run on these splits of the embedded images: A,B")
    parser.add_argument("--jobs", type=int, default=1, help="number of runs at a time (default: 1)")
    parser.add_argument("--devices", nargs="+", default=[], metavar="N", help="GPUs, each with one run at a time")
    parser.add_argument("--print", action="store_true", help="print a command for each run, for a scheduler; run none")


def run(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    from emu_jax.evaluate.compare import compare, table, write
    from emu_jax.sweep import Sweep, execute

    fields: dict[str, list[str]] = {}
    for field, *values in options.vary:
        if field in fields or not values:
            raise UserError(f"--vary {field}: expected one --vary with its values for each field")
        fields[field.removeprefix("config.")] = values
    if options.jobs < 1 or (options.devices and options.jobs > 1):
        raise UserError(f"--jobs {options.jobs}: expected 1 or more, and not beside --devices, which has one job each")
    runs = Sweep(options.config, options.out, fields, options.seeds, overrides, options.split).runs()
    if options.print:
        print(*(each.as_shell() for each in runs), sep="\n")
        return 0
    failed = execute(
        runs, devices=options.devices, jobs=options.jobs, tell=lambda line: print(line, file=sys.stderr, flush=True)
    )
    finished = [each.workdir for each in runs if each not in failed]
    if len(finished) > 1:
        comparison = compare(finished)
        print(table(comparison))
        print(*write(comparison, options.out, markdown=True), sep="\n")
    for each in failed:
        print(f"emu-jax sweep: {each.name} failed; its messages are above", file=sys.stderr)
    return EXIT_CRASH if failed else 0
