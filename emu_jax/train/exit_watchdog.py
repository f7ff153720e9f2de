"""Prints that a process ended, where it could not print that itself: a signal killed it, or C code crashed.

`python exit_watchdog.py PROCESS COUNT`; run as a file, because that starts fastest. It reads standard input, which the
watched process keeps open, and prints nothing if it reads `GOODBYE` there.
"""

from __future__ import annotations

import sys

GOODBYE = "goodbye"


def main() -> None:
    process, count = sys.argv[1:]
    if GOODBYE not in sys.stdin.read():  # returns when the process has ended
        print(
            f"emu-jax train: process {process} of {count} ended: a signal or a crash ended it; start it again to "
            "resume from the last checkpoint",
            file=sys.stderr,
            flush=True,
        )


if __name__ == "__main__":
    main()
