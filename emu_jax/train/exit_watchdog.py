"""What is said for a process that ends without a word, as JAX ends one at once when it loses process 0.

Run as a file, because that starts at once: `python exit_watchdog.py PROCESS COUNT HOST:PORT` (address of process 0). It
reads standard input, which the process keeps open, and says nothing after `GOODBYE`.
"""

from __future__ import annotations

import socket
import sys

GOODBYE = "goodbye"


def main() -> None:
    process, count, coordinator = sys.argv[1:]
    if GOODBYE in sys.stdin.read():  # returns when the process has ended, whatever ended it
        return
    cause = "a signal or a crash ended it"
    if process != "0":
        host, _, port = coordinator.rpartition(":")
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
        except OSError:
            cause = f"process 0 of {count} is lost: nothing answers at {coordinator}"
    print(
        f"emu-jax train: process {process} of {count} ended: {cause}; start the job again, it goes on from the last "
        "checkpoint",
        file=sys.stderr,
        flush=True,
    )


if __name__ == "__main__":
    main()
