"""`emu-jax train`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from emu_jax.cli.options import CONFIG_HELP, add_compilation_cache, path, use_compilation_cache
from emu_jax.errors import UserError

if TYPE_CHECKING:
    from emu_jax.data.tokenizer import Tokenizer
    from emu_jax.train.loop import Scoring
    from emu_jax.train.tasks.task import Task

ABOUT = "Train a config in a work directory; the same command resumes from the last checkpoint."
EXAMPLE = "emu-jax train --config configs/quickstart.py --workdir runs/quickstart --config.train.steps=20000"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, help=CONFIG_HELP)
    parser.add_argument("--workdir", required=True, type=path, help="folder for checkpoints, metrics and plots")
    parser.add_argument("--compile-only", action="store_true", help="compile the step, print its memory, write nothing")
    add_compilation_cache(parser)
    parser.add_argument(
        "--reshard-data", action="store_true", help="resume although data.shards or data.workers differ"
    )
    parser.add_argument(
        "--change",
        action="append",
        default=[],
        metavar="config.FIELD=VALUE",
        help="resume with another rate, clipping, length, mixture weight, …; recorded in workdir/history.jsonl",
    )
    parser.add_argument(
        "--skip-windows",
        type=int,
        default=0,
        metavar="N",
        help="leave out N packing windows of data, counted over the whole run",
    )
    parser.add_argument(
        "--score-every",
        type=int,
        default=0,
        metavar="N",
        help="score a sample of the embedded held-out images every N steps (for runs on the embedded images)",
    )
    parser.add_argument(
        "--track", nargs="+", default=[], metavar="TRACKER", help="send the metrics also to wandb, trackio, or both"
    )
    parser.add_argument("--name", default="", help="the run's name there (default: the work directory's)")
    parser.add_argument("--profile-steps", metavar="FIRST:LAST", help="trace these steps for xprof in workdir/profile")


def run(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    from emu_jax.config import load_config
    from emu_jax.train import distributed
    from emu_jax.train.loop import compile_only, train
    from emu_jax.train.metrics import parse_steps

    for word in options.change:
        if not word.startswith("config.") or "=" not in word:
            raise UserError(f"--change {word}: expected config.<field>=<value>")
    change = [word.partition("=")[0].removeprefix("config.") for word in options.change]
    profile = parse_steps(options.profile_steps) if options.profile_steps else range(0)
    scoring = _held_out(options.score_every) if options.score_every else None
    use_compilation_cache(options.compilation_cache)
    with distributed.job():
        config = load_config(options.config, [*overrides, *(f"--{word}" for word in options.change)])
        if options.compile_only:
            print(compile_only(config, options.workdir, change=change))
        else:
            train(
                config,
                options.workdir,
                profile=profile,
                reshard_data=options.reshard_data,
                change=change,
                skip_windows=options.skip_windows,
                scoring=scoring,
                track=options.track,
                name=options.name,
            )
    return 0


def _held_out(every: int) -> Scoring:
    """The scores of `--score-every`."""
    from emu_jax.evaluate.quickstart.held_out import HeldOut
    from emu_jax.models.emu import EmuConfig
    from emu_jax.train.loop import Scoring

    def make(task: Task, tokenizer: Tokenizer | None) -> HeldOut:
        if task.holds != "emu" or tokenizer is None:
            raise UserError(f"--score-every {every}: this run trains {task.holds}; only an Emu names images")
        return HeldOut(EmuConfig.from_dict(task.config.model), tokenizer)

    return Scoring(every, make)
