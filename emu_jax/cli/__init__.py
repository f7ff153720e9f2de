"""The console script `emu-jax`: one module for each command.

A command's module has ABOUT, EXAMPLE, `add_arguments` and `run`, which calls the library and prints what it returns. It
imports what it needs inside `run`, so that `emu-jax --help` does not wait for JAX. `errors.py` has the exit codes; an
error that a user can cause, and trouble that passes, is one line.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import os
import re
import shlex
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


OVERRIDE = "--config."  # begins the name of a field
OPTION = re.compile(r"-(?![\d.])")  # begins an option; a negative number is none


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    if not sys.stderr.isatty():  # a progress bar in a log would be a line a tenth of a second
        os.environ.setdefault("TQDM_MININTERVAL", "10")
    parser = make_parser()
    words, overrides, split = _take_overrides(sys.argv[1:] if arguments is None else arguments)
    if split and words[0] in COMMANDS:
        parser.exit(2, f"emu-jax {words[0]}: {split}\n")
    options, unknown = parser.parse_known_args(words)
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


def _take_overrides(words: Sequence[str]) -> tuple[list[str], list[str], str]:
    """The words of a command without its overrides, the overrides, and how to mend one that spaces have split.

    argparse would give an override with a space in its value to an option before it that takes several words.

    >>> _take_overrides(["train", "--config", "a.py", "--config.a.b=1", "--name", "x"])
    (['train', '--config', 'a.py', '--name', 'x'], ['--config.a.b=1'], '')
    >>> _take_overrides(["train", "--config.a.b", "1"])[2]
    '--config.a.b 1: write --config.a.b=1'
    """
    others: list[str] = []
    overrides: list[str] = []
    split = ""
    for number, word in enumerate(words):
        if word.startswith(OVERRIDE):
            overrides.append(word)
            continue
        after = number and words[number - 1].startswith(OVERRIDE) and others  # otherwise it is the command's name
        if after and not split and not OPTION.match(word):
            split = _mended(words[number - 1], list(itertools.takewhile(lambda w: not OPTION.match(w), words[number:])))
        others.append(word)
    return others, overrides, split


def _mended(word: str, values: Sequence[str]) -> str:
    """How to write an override and the words after it, which no option takes."""
    flag, _, value = word.partition("=")
    text = " ".join([value, *values]).removeprefix(" ").removeprefix("=").strip()
    line = f"{' '.join([word, *values])}: write {shlex.quote(f'{flag}={text}')}"
    return f"{line} if {values[0]} belongs to the value" if value else line


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
