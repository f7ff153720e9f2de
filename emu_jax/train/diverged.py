"""The end of a run that must not continue as it is."""

from __future__ import annotations

EXIT_DIVERGED = 70  # EX_SOFTWARE: starting it again changes nothing; a person has to change a setting or skip data


class Diverged(Exception):
    """The loss, the gradient or the state is not finite; one line says since when, where, and what to do."""
