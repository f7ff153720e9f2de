"""Errors that a user can cause. The command line prints them as one line and exits with code 2."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from typing import Any


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
    """Raises unless `fields` are exactly what the dataclass `cls`, configured at `where`, takes."""
    known = {field.name: field for field in dataclasses.fields(cls)}
    for name in fields:
        if name not in known:
            raise UserError(f"{where}.{name} is no field of {cls.__name__}; did you mean {nearest(name, known)}?")
    for name, field in known.items():
        if name not in fields and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise UserError(f"{where}.{name} is missing; {cls.__name__} needs it")
