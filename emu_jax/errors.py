"""Errors that a user can cause. The command line prints them as one line and exits with code 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """One line that names the thing, the place, what was expected and what to do."""


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name closest to a mistyped one, or all of them when none is close."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return close[0] if close else " | ".join(names)
