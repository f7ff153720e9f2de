"""Several processes as one job: they start together, watch one another, and end together.

On Cloud TPU VMs, GKE, Slurm and Open MPI the processes find one another. Elsewhere environment variables describe them:

    EMU_JAX_COORDINATOR=host:port   address of process 0      EMU_JAX_PROCESSES=N   EMU_JAX_PROCESS=0 … N-1
    EMU_JAX_TIMEOUT=90              seconds after which a silent process, or a step that does not end, ends the job;
                                    at the start, processes wait for one another three times as long

A single process starts none of this.

Every process publishes a heartbeat and its phase in JAX's coordination service. So each process can name the one that
is lost or hangs, and exit: a collective operation that waits for a lost process would never return.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from emu_jax.errors import UserError
from emu_jax.train import exit_watchdog

EXIT_PREEMPTED = 75  # EX_TEMPFAIL: saved, run it again. An unhandled SIGTERM exits with 143.
EXIT_DIVERGED = 70  # EX_SOFTWARE: too many bad steps in a row, or a state that is not finite
EXIT_LOST = 69  # EX_UNAVAILABLE: another process was lost, hung or failed

COORDINATOR, PROCESSES, PROCESS = VARIABLES = ("EMU_JAX_COORDINATOR", "EMU_JAX_PROCESSES", "EMU_JAX_PROCESS")
TIMEOUT = "EMU_JAX_TIMEOUT"
HEARTBEATS = "emu_jax/heartbeats/"  # key prefix in the coordination service
HOST = socket.gethostname()
# Phases of a process, in the order of a step.
STARTING, READING, COMPUTING, SAVING = PHASES = ("starting", "reading data", "computing", "saving")
UNTIMED_PHASES = (STARTING, SAVING)  # they may take longer than the timeout
# JAX's own timeout is longer by these seconds: JAX exits without naming the lost process.
JAX_TIMEOUT_MARGIN = 20


class Preempted(Exception):
    """SIGTERM stopped the run, and its state is saved."""


class Diverged(Exception):
    """Bad steps, or a state that is not finite, stopped the run, on all processes; its checkpoints are good."""


# ---- the processes of a job ------------------------------------------------------------------------------------------


def find_job(environment: Mapping[str, str]) -> dict[str, Any] | None:
    """Arguments of `jax.distributed.initialize` where this is one process of several, otherwise None.

    Raises:
      UserError: a variable is missing or malformed.
    """
    given = [name for name in VARIABLES if name in environment]
    if not given:
        return _find_cluster()
    for name in VARIABLES:
        if name not in environment:
            raise UserError(f"{name} is not set, but {given[0]} is; a process of several needs {', '.join(VARIABLES)}")
    if not re.fullmatch(r"\S+:\d{1,5}", environment[COORDINATOR]):
        raise UserError(
            f"{COORDINATOR}={environment[COORDINATOR]!r}; expected process 0's host:port, as in 10.0.0.1:8476"
        )
    count = _whole_number(environment, PROCESSES, "how many processes there are", 1, None)
    process = _whole_number(environment, PROCESS, f"which of {PROCESSES}={count} this is", 0, count - 1)
    if count == 1:
        return None
    return {
        "coordinator_address": environment[COORDINATOR],
        "num_processes": count,
        "process_id": process,
        "cluster_detection_method": "deactivate",
    }


def _whole_number(environment: Mapping[str, str], name: str, what: str, low: int, high: int | None) -> int:
    text = environment[name]
    if not re.fullmatch(r"\d{1,9}", text) or int(text) < low or (high is not None and int(text) > high):
        expected = f"{low} or more" if high is None else f"{low} to {high}"
        raise UserError(f"{name}={text!r}; expected {what}, a whole number of {expected}")
    return int(text)


def _find_cluster() -> dict[str, Any] | None:
    """JAX's own detection of clusters, for more than one process: a single TPU VM needs no cluster."""
    # JAX has no public function for it. Kubernetes without TPUs is left out: every pod looks like a cluster.
    from jax._src.clusters import GceTpuCluster, GkeTpuCluster, OmpiCluster, SlurmCluster

    for cluster in (OmpiCluster, SlurmCluster, GkeTpuCluster, GceTpuCluster):
        if cluster.is_env_present():
            return {"cluster_detection_method": cluster.name} if cluster.get_process_count() > 1 else None
    return None


def _timeout(environment: Mapping[str, str]) -> float:
    text = environment.get(TIMEOUT, "90")
    if not re.fullmatch(r"\d{1,6}(\.\d+)?", text) or float(text) < 5:
        raise UserError(f"{TIMEOUT}={text!r}; expected seconds, at least 5")
    return float(text)


def _await_coordinator(address: str, seconds: float) -> None:
    """Returns once process 0 answers. If it never does, JAX ends the process without an exception to catch."""
    host, _, port = address.rpartition(":")
    until = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
            return
        except (OSError, OverflowError) as error:
            if time.monotonic() > until:
                raise UserError(
                    f"{COORDINATOR}={address}: nothing answers there for {seconds:g} s ({error}); expected process 0, "
                    "started with the same address"
                ) from error
            time.sleep(0.5)


# ---- the job ---------------------------------------------------------------------------------------------------------

_watch: Watch | None = None


@contextlib.contextmanager
def job() -> Iterator[None]:
    """Joins the job's other processes, if there are any, and leaves together with them.

    An error inside ends all processes: this one exits with 2 (UserError) or 1, the others with `EXIT_LOST`.

    Raises:
      UserError: the environment is wrong, or the other processes did not join in time.
    """
    global _watch
    settings, timeout = find_job(os.environ), _timeout(os.environ)
    if settings is None:
        yield
        return
    join_timeout = int(3 * timeout)
    if settings.get("process_id"):
        _await_coordinator(settings["coordinator_address"], join_timeout)
    try:
        jax.distributed.initialize(
            **settings,
            initialization_timeout=join_timeout,
            heartbeat_timeout_seconds=int(timeout) + JAX_TIMEOUT_MARGIN,
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(f"cannot join the other processes ({str(error).splitlines()[0][:200]})") from error
    _watch = Watch(timeout)
    try:
        yield
    except (Preempted, Diverged, SystemExit):
        _watch.close()
        raise
    except BaseException as error:
        _watch.fail(error)
    _watch.close()


def heartbeat(phase: str, step: int) -> None:
    """Records which of `PHASES` this process enters; the others read it, and the timeout starts anew."""
    if _watch is not None:
        _watch.heartbeat(phase, step)


def broadcast_from_process_0(value: int) -> int:
    """Process 0's value, on every process."""
    return int(multihost_utils.broadcast_one_to_all(np.int32(value))) if jax.process_count() > 1 else value


def allgather(value: int) -> list[int]:
    """The value of every process, in their order, on every process."""
    return [int(v) for v in multihost_utils.process_allgather(np.int32(value))] if jax.process_count() > 1 else [value]


def merge_across_processes(tree: dict[str, Any]) -> dict[str, Any]:
    """The nested dicts of all processes merged into one, on every process; the lowest process wins where keys clash."""
    if jax.process_count() == 1:
        return tree
    data = np.frombuffer(json.dumps(tree).encode(), np.uint8)
    sizes = allgather(len(data))
    padded = np.zeros(max(sizes), np.uint8)
    padded[: len(data)] = data
    rows = multihost_utils.process_allgather(padded)  # [processes, bytes]
    result: dict[str, Any] = {}
    for row, size in zip(rows, sizes, strict=True):
        _merge(result, json.loads(row[:size].tobytes()))
    return result


def _merge(tree: dict[str, Any], other: dict[str, Any]) -> None:
    for key, value in other.items():
        if isinstance(value, dict) and isinstance(tree.get(key), dict):
            _merge(tree[key], value)
        else:
            tree.setdefault(key, value)


class Preemption:
    """Stops a run after SIGTERM; it is enough to signal one process of several.

    With several processes, JAX catches the signal and all of them stop after the same step.
    """

    def __enter__(self) -> Preemption:
        self._signalled = False
        # Only Python's main thread can handle signals; elsewhere, as in a notebook's thread, none are handled.
        self._handles = jax.process_count() == 1 and threading.current_thread() is threading.main_thread()
        if self._handles:
            self._before = signal.signal(signal.SIGTERM, self._on_signal)
        return self

    def __exit__(self, *error: object) -> None:
        if self._handles:
            signal.signal(signal.SIGTERM, self._before)

    def _on_signal(self, *signal_and_frame: object) -> None:
        self._signalled = True

    def reached(self, step: int) -> bool:
        """Whether to stop after this step; must be called after every step."""
        if jax.process_count() == 1:
            return self._signalled
        return multihost_utils.reached_preemption_sync_point(step)


# ---- watching one another --------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Report:
    """A process's heartbeat, as the others read it.

    Attributes:
      beat: count of its heartbeats.
      phase, step, seconds: one of `PHASES`, its step, and the time since the process entered it.
      failure: why the process is about to exit; "" while it runs.
      ended: whether it has left the job in order.
    """

    process: int
    host: str
    beat: int
    phase: str
    step: int
    seconds: float
    failure: str
    ended: bool


class Watch:
    """A thread that publishes this process's reports and reads those of the others.

    Args:
      timeout: seconds of silence, or in one phase of a step, after which a process counts as lost.
    """

    def __init__(self, timeout: float):
        from jax._src.distributed import global_state  # the only access to the service that JAX has started

        self._client: Any = global_state.client
        self._timeout = timeout
        self._process, self._count = jax.process_index(), jax.process_count()
        # Every process reads all reports: the more processes, the longer the interval.
        self._interval = min(timeout / 20, max(1.0, self._count / 64))
        self._phase = (STARTING, 0, time.monotonic())
        self._failure, self._ended, self._beat = "", False, 0
        self._heard: dict[int, tuple[int, float]] = {}  # newest beat of each process, and when it was read
        self._failed: dict[int, float] = {}  # when the failure of a process was read
        self._stopping = threading.Event()
        names = [str(self._process), str(self._count), str(global_state.coordinator_address)]
        self._exit_watchdog = subprocess.Popen(
            [sys.executable, "-S", exit_watchdog.__file__, *names], stdin=subprocess.PIPE, start_new_session=True
        )
        self._thread = threading.Thread(target=self._run, name="emu-jax-watch", daemon=True)
        self._thread.start()

    def heartbeat(self, phase: str, step: int) -> None:
        self._phase = (phase, step, time.monotonic())

    def close(self) -> None:
        """Leaves the job together with all other processes."""
        self._ended = True
        self._stopping.set()
        self._thread.join()
        jax.distributed.shutdown()
        self._say_goodbye()

    def fail(self, error: BaseException) -> None:
        """Publishes why this process fails, and exits."""
        code = 2 if isinstance(error, UserError) else 130 if isinstance(error, KeyboardInterrupt) else 1
        if isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in str(error):
            # Most likely another process is lost; the thread is about to find out which one and to end this process.
            time.sleep(self._timeout + 3 * self._interval)
        if code == 1:
            traceback.print_exception(error)
        text = str(error) if code == 2 else f"{type(error).__name__}: {error}"
        self._failure = text.splitlines()[0][:300]
        time.sleep(4 * self._interval)  # so that the others read it: the service ends with process 0
        self._leave(text, code)

    def _run(self) -> None:
        try:
            while not self._stopping.wait(self._interval):
                reports = self._exchange()
                fate = None if self._failure else self._judge(reports)
                if fate is not None:
                    self._failure = fate
                    self._exchange()
                    time.sleep(3 * self._interval)
                    self._leave(f"{fate}; start the job again to resume from the last checkpoint", EXIT_LOST)
            self._exchange()  # publishes that it has ended
        except jax.errors.JaxRuntimeError as error:
            reason = str(error).splitlines()[0][:200]
            self._leave(
                f"process 0 of {self._count} is lost: its coordination service does not answer ({reason}); start the "
                "job again to resume from the last checkpoint",
                EXIT_LOST,
            )

    def _exchange(self) -> list[Report]:
        """Publishes this process's report, and reads all reports."""
        self._beat += 1
        phase, step, began = self._phase
        seconds = time.monotonic() - began
        own = Report(self._process, HOST, self._beat, phase, step, seconds, self._failure, self._ended)
        text = json.dumps(dataclasses.asdict(own))
        self._client.key_value_set(f"{HEARTBEATS}{self._process}", text, allow_overwrite=True)
        return [Report(**json.loads(value)) for _, value in self._client.key_value_dir_get(HEARTBEATS)]

    def _judge(self, reports: list[Report]) -> str | None:
        """Why the job has to end, naming the process; None while it need not."""
        now = time.monotonic()
        for report in reports:
            beat, when = self._heard.get(report.process, (0, now))
            if report.beat != beat:
                self._heard[report.process] = report.beat, now
            # If this process is about to fail in the same way (a wrong setting, say), it should report that itself.
            if report.failure and now - self._failed.setdefault(report.process, now) > 1.5 * self._interval:
                return f"{self._name(report)} ended: {report.failure}"
            if report.beat == beat and now - when > self._timeout and not (report.ended or report.failure):
                silent = f"no sign of life for {now - when:.0f} s"
                return f"{self._name(report)} is lost: {silent}, last seen {report.phase}, step {report.step}"
        # The others wait for the process that is furthest behind; among equals, for the one that got there last.
        last = min(reports, key=lambda report: (report.step, PHASES.index(report.phase), report.seconds))
        if last.seconds > self._timeout and last.phase not in UNTIMED_PHASES:
            return f"{self._name(last)} hangs {last.phase}, step {last.step}, for more than {self._timeout:g} s"
        return None

    def _name(self, report: Report) -> str:
        return f"process {report.process} of {self._count} ({report.host})"

    def _say_goodbye(self) -> None:
        self._exit_watchdog.communicate(exit_watchdog.GOODBYE.encode())

    def _leave(self, message: str, code: int) -> None:
        print(f"\nemu-jax train: {message}", file=sys.stderr, flush=True)  # a progress bar may fill the line
        self._say_goodbye()
        os._exit(code)  # an orderly exit would wait for the lost process
