"""The console script `emu-jax`: one module for each command.

A command's module has ABOUT, EXAMPLE, `add_arguments` and `run`, which calls the library and prints what it returns. It
imports what it needs inside `run`, so that `emu-jax --help` does not wait for JAX. `errors.py` has the exit codes; an
error that a user can cause, and trouble that passes, is one line.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from emu_jax.ending import ending

COMMANDS = (
    "prepare",
    "inspect-data",
    "train",
    "precompute",
    "generate",
    "chat",
    "serve",
    "evaluate",
    "compare",
    "sweep",
    "inspect",
    "plan",
    "bench",
    "convert",
    "export",
)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    if not sys.stderr.isatty():  # a progress bar in a log would be a line a tenth of a second
        os.environ.setdefault("TQDM_MININTERVAL", "10")
    parser = make_parser()
    options, rest = parser.parse_known_args(arguments)
    overrides = [word for word in rest if word.startswith("--config.")]
    unknown = [word for word in rest if not word.startswith("--config.")]
    if unknown or (overrides and "config" not in options):
        line = f"emu-jax {options.command}: unknown argument {(unknown or overrides)[0]}"
        parser.exit(2, f"{line}; see emu-jax {options.command} --help\n")
    try:
        return options.run(options, overrides)
    except BaseException as error:
        code, line = ending(error)
        if not line:
            raise
        print(f"emu-jax {options.command}: {line}", file=sys.stderr)
        return code


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = Parser(prog="emu-jax", description="Emu in JAX: train it, prompt it, evaluate it, look inside.")
    parsers = parser.add_subparsers(dest="command", required=True, metavar="{" + ",".join(COMMANDS) + "}")
    for name in COMMANDS:
        command = importlib.import_module(f"emu_jax.cli.{name.replace('-', '_')}")
        epilog = f"example: {command.EXAMPLE}"
        own = parsers.add_parser(name, help=command.ABOUT, description=command.ABOUT, epilog=epilog, allow_abbrev=False)
        command.add_arguments(own)
        own.set_defaults(run=command.run)
    return parser
