"""Errors that a user can cause. The command line prints them as one line and exits with code 2."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Iterable, Mapping
from typing import Any

SCALARS = (bool, int, float, str)


class UserError(ValueError):
    """One line that names the thing, the place, what was expected and what to do."""


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name closest to a mistyped one, or all of them when none is close.

    >>> nearest("stpes", ["steps", "minutes"])
    'steps'
    >>> nearest("x", ["steps", "minutes"])
    'minutes | steps'
    """
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return close[0] if close else " | ".join(names)


def check_fields(cls: type, where: str, fields: Mapping[str, Any]) -> None:
    """Raises unless `fields` are exactly what the dataclass `cls`, configured at `where`, takes.

    A bool, int, float or str must be one; an int is taken for a float. What a field of another type holds is checked
    by who builds it.

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
    if isinstance(value, bool):  # which Python also takes for an int
        return expected is bool
    return isinstance(value, (int, float) if expected is float else expected)
