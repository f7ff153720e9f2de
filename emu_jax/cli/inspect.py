"""`emu-jax inspect`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from emu_jax.cli.options import CONFIG_HELP

ABOUT = "Print a model's parts, parameter counts and shapes without allocating it."
EXAMPLE = "emu-jax inspect --config configs/models.py:14b"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, help=CONFIG_HELP)


def run(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    from emu_jax.config import load_config
    from emu_jax.inspect.model import describe

    print(describe(load_config(options.config, overrides)))
    return 0
