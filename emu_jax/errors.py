"""Errors that the command line prints as one line, and the exit codes of commands (`ending.py`)."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, TypeVar

SCALARS = (bool, int, float, str)
Built = TypeVar("Built")

EXIT_CRASH, EXIT_USER, EXIT_LOST, EXIT_DIVERGED, EXIT_AGAIN, EXIT_INTERRUPTED = 1, 2, 69, 70, 75, 130


class CommandError(Exception):
    """Ends a command with one line on standard error, and with `exit_code`."""

    exit_code: ClassVar[int]


class UserError(CommandError, ValueError):
    """One line that names the thing, the place, what was expected and how to mend it."""

    exit_code = EXIT_USER


class TransientError(CommandError, RuntimeError):
    """One line about what may pass, such as storage that does not answer; starting the command again may help."""

    exit_code = EXIT_AGAIN


def shown(value: Any) -> str:
    """A JSON value as a message names it, in one line of at most about 60 characters.

    >>> [shown(value) for value in (None, float("nan"), ["a"], {}, "caf\u00e9")]
    ['null', 'NaN', 'a list of 1', 'an object', "'caf\\\\xe9'"]
    """
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else f"a list of {len(value)}"
    text = "NaN" if value != value else ascii(value)
    return text if len(text) <= 60 else text[:60] + "\u2026"


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name closest to a mistyped one, or all names when none is close.

    >>> nearest("stpes", ["steps", "minutes"])
    'steps'
    >>> nearest("x", ["steps", "minutes"])
    'minutes | steps'
    """
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return close[0] if close else " | ".join(names)


def build(cls: type[Built], where: str, fields: Mapping[str, Any]) -> Built:
    """The dataclass `cls` from a group of fields at `where`, which `check_fields` checks; lists become tuples.

    Raises:
      UserError: a field is unknown, missing or of another type, or `cls` refuses its value.
    """
    check_fields(cls, where, fields)
    return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in dict(fields).items()})


def check_fields(cls: type, where: str, fields: Mapping[str, Any]) -> None:
    """Raises unless `fields` are exactly those of the dataclass `cls`, which is configured at `where`.

    A bool, int, float or str must have that type; an int also serves as a float. Other types are left to the caller.

    >>> @dataclasses.dataclass
    ... class Loss:
    ...     weight: float = 1.0
    >>> check_fields(Loss, "config.loss", {"weight": 2})
    >>> check_fields(Loss, "config.loss", {"weight": "x"})
    Traceback (most recent call last):
    emu_jax.errors.UserError: config.loss.weight='x': expected float, got str
    """
    if not hasattr(fields, "keys"):
        raise UserError(f"{where}={fields!r}: expected a group of fields, those of {cls.__name__}")
    known = {field.name: field for field in dataclasses.fields(cls)}
    types = typing.get_type_hints(cls)
    for name in fields:
        if name not in known:
            raise UserError(f"{where}.{name} is no field of {cls.__name__}; did you mean {nearest(name, known)}?")
        expected, value = types[name], fields[name]
        if expected in SCALARS and not _is_scalar(value, expected):
            shown = f"={value!r}" if isinstance(value, SCALARS) else ""
            quoted = "; quote it twice, as in '\"12\"'" if expected is str and shown else ""
            raise UserError(f"{where}.{name}{shown}: expected {expected.__name__}, got {type(value).__name__}{quoted}")
    for name, field in known.items():
        if name not in fields and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise UserError(f"{where}.{name} is missing; {cls.__name__} needs it")


def _is_scalar(value: object, expected: type) -> bool:
    if isinstance(value, bool):  # a subclass of int
        return expected is bool
    return isinstance(value, (int, float) if expected is float else expected)
