"""Prints why a process ended, where it could not print that itself: JAX ends a process at once when process 0 is lost.

`python exit_watchdog.py PROCESS COUNT HOST:PORT` (address of process 0); run as a file, because that starts fastest. It
reads standard input, which the watched process keeps open, and prints nothing if it reads `GOODBYE` there.
"""

from __future__ import annotations

import socket
import sys

GOODBYE = "goodbye"


def main() -> None:
    process, count, coordinator = sys.argv[1:]
    if GOODBYE in sys.stdin.read():  # returns when the process has ended
        return
    cause = "a signal or a crash ended it"
    if process != "0":
        host, _, port = coordinator.rpartition(":")
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
        except OSError:
            cause = f"process 0 of {count} is lost: nothing answers at {coordinator}"
    print(
        f"emu-jax train: process {process} of {count} ended: {cause}; start the job again to resume from the "
        "last checkpoint",
        file=sys.stderr,
        flush=True,
    )


if __name__ == "__main__":
    main()
