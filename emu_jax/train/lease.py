"""The lease of a work directory: two runs never train in one.

    workdir/lease.json   {"run": …, "machine": …, "process": …, "started": …, "beat": …}

The run that holds it rewrites it every `BEAT` seconds and removes it at its end. A run that finds one asks whether its
holder still lives: on the same machine by the process, on another by waiting for its next beat, so that no clocks are
compared. A holder that was stopped in between (its machine slept) sees another run's lease at its next beat or save,
and ends.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator

import jax

from emu_jax.errors import TransientError, UserError
from emu_jax.storage import Path, create_text, replace_text
from emu_jax.train import distributed

FILE = "lease.json"
BEAT = 30.0  # seconds
PATIENCE = 2.5 * BEAT  # after which a holder on another machine counts as gone
HALF_WRITTEN_WITHIN = 5.0  # seconds after which a lease that cannot be read is of a process that died while writing it
SHARED_WITHIN = 30.0  # seconds until a new file on a shared disk is seen by every host


@dataclasses.dataclass(frozen=True)
class Holder:
    """Who holds a work directory.

    Attributes:
      run: drawn for each start.
      machine: host name, boot and process namespace: process numbers mean the same within.
      process, started: process number, and its start in clock ticks, because numbers are used again; 0: unknown.
      beat: counts up while it lives.
    """

    run: int
    machine: str
    process: int
    started: int
    beat: int

    @classmethod
    def current(cls) -> Holder:
        return cls(secrets.randbits(31), _machine(), os.getpid(), _started(os.getpid()), 0)

    @property
    def host(self) -> str:
        return self.machine.split(" ", 1)[0]

    def is_alive(self) -> bool | None:
        """Whether its process runs; None: it runs on another machine, if at all."""
        if self.machine != _machine() or not self.started:
            return None
        return self.process != os.getpid() and _started(self.process) == self.started


class Lease:
    """Holds a work directory within a `with` block.

    Raises:
      UserError: on entering: another run holds it, or nothing can be written there.
    """

    def __init__(self, workdir: Path):
        self._workdir, self._file = workdir, workdir / FILE
        self._holder = Holder.current()
        self._ending = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._beat, name="emu-jax-lease", daemon=True)

    @property
    def run(self) -> int:
        """The number by which other processes of this run recognise the work directory (`check_shared`)."""
        return self._holder.run

    def __enter__(self) -> Lease:
        try:
            self._workdir.mkdir(parents=True, exist_ok=True)
            unreadable = 0
            while not create_text(self._file, _dump(self._holder)):
                found = _read(self._file)
                if found is not None and found.run == self._holder.run:
                    break  # created, but the answer was lost
                if found is not None:
                    self._await_end(found)
                elif unreadable * 0.2 > HALF_WRITTEN_WITHIN:
                    self._file.unlink(missing_ok=True)
                unreadable += 1
                time.sleep(0.2)
        except OSError as error:
            reason = error.strerror or str(error).splitlines()[0][:200]
            raise UserError(
                f"workdir={self._workdir}: nothing can be written there ({reason}); name a folder where you may write"
            ) from error
        self._thread.start()
        return self

    def _await_end(self, holder: Holder) -> None:
        """Removes the lease of a run that has ended without removing it.

        Raises:
          UserError: the run lives.
        """
        alive = holder.is_alive()
        if alive is None:
            print(
                f"emu-jax train: {self._file} is of a run on {holder.host}, process {holder.process}; waiting up to "
                f"{PATIENCE:.0f} s to see whether it lives",
                file=sys.stderr,
            )
            until = time.monotonic() + PATIENCE
            while alive is None and time.monotonic() < until:
                time.sleep(1.0)
                found = _read(self._file)
                if found is None:
                    return
                alive = True if found != holder else None
        if alive:
            raise UserError(
                f"workdir={self._workdir}: another run trains in it (host {holder.host}, process {holder.process}); "
                "stop that one first, or use a new work directory"
            )
        if _read(self._file) == holder:
            self._file.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._ending.wait(BEAT):
            try:
                self.check()
            except UserError:
                return  # the run's own thread will see it too
            except (OSError, TransientError):
                continue  # if it lasts, saving and logging tell
            with self._lock:
                if self._ending.is_set():
                    return
                self._holder = dataclasses.replace(self._holder, beat=self._holder.beat + 1)
                try:
                    replace_text(self._file, _dump(self._holder))
                except (OSError, TransientError):
                    continue

    def check(self) -> None:
        """Checks that the lease is still this run's; called before every save.

        Raises:
          UserError: another run has taken the work directory over, or the lease was deleted.
        """
        found = _read(self._file)
        if found is None or found.run != self._holder.run:
            by = f"a run on {found.host}, process {found.process}, has taken it over" if found else f"{FILE} is gone"
            raise UserError(
                f"workdir={self._workdir}: {by}; this run was stopped before it saved anything more; only one run may "
                "train in a work directory"
            )

    def __exit__(self, *error: object) -> None:
        self._ending.set()
        with self._lock:
            try:
                found = _read(self._file)
                if found is not None and found.run == self._holder.run:
                    self._file.unlink(missing_ok=True)
            except (OSError, TransientError):
                pass  # the next run sees that this process has ended


@contextlib.contextmanager
def hold(workdir: Path) -> Iterator[Callable[[], None]]:
    """Holds a work directory for all processes of a run; yields `Lease.check`, which does nothing on other processes.

    Every process calls it.

    Raises:
      UserError: another run holds it, nothing can be written there, or this process sees another folder.
    """
    if jax.process_index():
        check_shared(workdir, distributed.broadcast_from_process_0(0), jax.process_index())
        yield lambda: None
        return
    with Lease(workdir) as lease:
        distributed.broadcast_from_process_0(lease.run)
        yield lease.check


def check_shared(workdir: Path, run: int, process: int) -> None:
    """Checks on a process beside the first that it sees the first one's lease.

    Raises:
      UserError: it does not: the work directory is another folder there.
    """
    until = time.monotonic() + SHARED_WITHIN
    while True:
        found = _read(workdir / FILE)
        if found is not None and found.run == run:
            return
        if time.monotonic() > until:
            raise UserError(
                f"workdir={workdir}: process {process} does not see the {FILE} that process 0 has just written there; "
                "expected one folder that all processes share, such as gs://…"
            )
        time.sleep(0.5)


def _read(file: Path) -> Holder | None:
    """The holder that a lease names; None: there is no lease, or none that can be read (it is being written)."""
    try:
        return Holder(**json.loads(file.read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def _dump(holder: Holder) -> str:
    return json.dumps(dataclasses.asdict(holder)) + "\n"


def _machine() -> str:
    def read(path: str) -> str:
        try:
            return pathlib.Path(path).read_text().strip()
        except OSError:
            return "?"

    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = "?"
    return f"{socket.gethostname()} {read('/proc/sys/kernel/random/boot_id')} {namespace}"


def _started(process: int) -> int:
    """When a process was started, in clock ticks since boot; 0: there is none, or this system does not tell."""
    try:
        stat = pathlib.Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return 0
    return int(stat.rpartition(")")[2].split()[19])
