"""Several processes as one job: they start together, watch one another, and end together.

On Cloud TPU VMs, GKE, Slurm and Open MPI they find one another; elsewhere the environment says who is who:

    EMU_JAX_COORDINATOR=host:port   where process 0 is reached      EMU_JAX_PROCESSES=N   EMU_JAX_PROCESS=0 … N-1
    EMU_JAX_TIMEOUT=90              seconds after which a silent process, or a step that does not end, ends the job;
                                    three times as long the processes may wait for one another at the start

A process alone is left alone: nothing of this starts.

Every process tells the others, through JAX's coordination service, that it lives and where it stands. So each can
say which one was lost, or hangs, and end: a collective operation that waits for the lost one would never return.
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

EXIT_PREEMPTED = 75  # EX_TEMPFAIL: saved, run it again. An unhandled SIGTERM would be 143.
EXIT_LOST = 69  # EX_UNAVAILABLE: another process was lost, hung or failed

COORDINATOR, PROCESSES, PROCESS = VARIABLES = ("EMU_JAX_COORDINATOR", "EMU_JAX_PROCESSES", "EMU_JAX_PROCESS")
TIMEOUT = "EMU_JAX_TIMEOUT"
BEATS = "emu_jax/beats/"  # in the coordination service
HOST = socket.gethostname()
# What a process does, in this order.
STARTING, READING, COMPUTING, SAVING = PLACES = ("starting", "reading data", "computing", "saving")
PATIENT = (STARTING, SAVING)  # they may take longer than the timeout
JAX_WAITS_LONGER = 20  # seconds: JAX ends a process without naming the lost one


class Preempted(Exception):
    """The run was asked to stop, and has saved its state."""


# ---- who is in the job -----------------------------------------------------------------------------------------------


def find_job(environment: Mapping[str, str]) -> dict[str, Any] | None:
    """Arguments of `jax.distributed.initialize` where this is one process of several, else None.

    Raises:
      UserError: a variable is missing or cannot be what it says.
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
    """JAX's own detection, asked first how many processes there are: a TPU VM alone needs no cluster."""
    # JAX tells of a cluster only while it joins it. Kubernetes without TPUs is left out: any pod looks like a cluster.
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
    """Returns once process 0 answers; JAX itself ends the process without an error that could be caught."""
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
    """Joins the other processes, where there are any, and leaves with them.

    An error inside ends all processes: this one with 2 (UserError) or 1, the others with `EXIT_LOST`.

    Raises:
      UserError: the environment is wrong, or the others did not come.
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
            heartbeat_timeout_seconds=int(timeout) + JAX_WAITS_LONGER,
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(f"cannot join the other processes ({str(error).splitlines()[0][:200]})") from error
    _watch = Watch(timeout)
    try:
        yield
    except (Preempted, SystemExit):
        _watch.close()
        raise
    except BaseException as error:
        _watch.fail(error)
    _watch.close()


def at(place: str, step: int) -> None:
    """Notes which of `PLACES` this process is at: for others to read, and not to stay there too long."""
    if _watch is not None:
        _watch.at(place, step)


def agreed(value: int) -> int:
    """Process 0's value, on all of them."""
    return int(multihost_utils.broadcast_one_to_all(np.int32(value))) if jax.process_count() > 1 else value


def gathered(value: int) -> list[int]:
    """Everyone's value, in order of the processes."""
    return [int(v) for v in multihost_utils.process_allgather(np.int32(value))] if jax.process_count() > 1 else [value]


def joined(tree: dict[str, Any]) -> dict[str, Any]:
    """Everyone's nested dicts as one, on all processes: keys of all; of equal keys, the first process's value."""
    if jax.process_count() == 1:
        return tree
    data = np.frombuffer(json.dumps(tree).encode(), np.uint8)
    sizes = gathered(len(data))
    padded = np.zeros(max(sizes), np.uint8)
    padded[: len(data)] = data
    everyone = multihost_utils.process_allgather(padded)  # [processes, bytes]
    result: dict[str, Any] = {}
    for row, size in zip(everyone, sizes, strict=True):
        _add(result, json.loads(row[:size].tobytes()))
    return result


def _add(tree: dict[str, Any], other: dict[str, Any]) -> None:
    for key, value in other.items():
        if isinstance(value, dict) and isinstance(tree.get(key), dict):
            _add(tree[key], value)
        else:
            tree.setdefault(key, value)


class Preemption:
    """Whether the run was asked to stop, by SIGTERM; of several processes it is enough to ask one.

    Several processes agree on the step after which they stop. JAX catches the signal for them.
    """

    def __enter__(self) -> Preemption:
        self._asked = False
        # Python lets the main thread alone handle signals; a notebook's thread is not asked to stop.
        self._handles = jax.process_count() == 1 and threading.current_thread() is threading.main_thread()
        if self._handles:
            self._before = signal.signal(signal.SIGTERM, self._ask)
        return self

    def __exit__(self, *error: object) -> None:
        if self._handles:
            signal.signal(signal.SIGTERM, self._before)

    def _ask(self, *signal_and_frame: object) -> None:
        self._asked = True

    def reached(self, step: int) -> bool:
        """Whether to stop after this step; to be asked after every step."""
        if jax.process_count() == 1:
            return self._asked
        return multihost_utils.reached_preemption_sync_point(step)


# ---- watching one another --------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Report:
    """Where a process stands, as the others read it.

    Attributes:
      beat: counts up. place, step, seconds: what it does, and for how long. failure: why it is about to end.
    """

    process: int
    host: str
    beat: int
    place: str
    step: int
    seconds: float
    failure: str
    ended: bool


class Watch:
    """A thread that reports this process and reads the others' reports.

    Args:
      timeout: seconds of silence, or at one place of a step, after which a process counts as lost.
    """

    def __init__(self, timeout: float):
        from jax._src.distributed import global_state  # the only way to the service that JAX has started

        self._client: Any = global_state.client
        self._timeout = timeout
        self._process, self._count = jax.process_index(), jax.process_count()
        # Everyone reads everyone's reports: the more there are, the rarer.
        self._interval = min(timeout / 20, max(1.0, self._count / 64))
        self._place = (STARTING, 0, time.monotonic())
        self._failure, self._ended, self._beat = "", False, 0
        self._heard: dict[int, tuple[int, float]] = {}  # newest beat of a process, and when it came
        self._failed: dict[int, float] = {}  # when a process told of its failure
        self._stopping = threading.Event()
        names = [str(self._process), str(self._count), str(global_state.coordinator_address)]
        self._last_words = subprocess.Popen(
            [sys.executable, "-S", exit_watchdog.__file__, *names], stdin=subprocess.PIPE, start_new_session=True
        )
        self._thread = threading.Thread(target=self._run, name="emu-jax-watch", daemon=True)
        self._thread.start()

    def at(self, place: str, step: int) -> None:
        self._place = (place, step, time.monotonic())

    def close(self) -> None:
        """Leaves when all others do."""
        self._ended = True
        self._stopping.set()
        self._thread.join()
        jax.distributed.shutdown()
        self._say_goodbye()

    def fail(self, error: BaseException) -> None:
        """Ends this process, and tells the others why."""
        code = 2 if isinstance(error, UserError) else 130 if isinstance(error, KeyboardInterrupt) else 1
        if isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in str(error):
            # Most likely another process is lost, and the thread is about to know which one: it ends this process then.
            time.sleep(self._timeout + 3 * self._interval)
        if code == 1:
            traceback.print_exception(error)
        text = str(error) if code == 2 else f"{type(error).__name__}: {error}"
        self._failure = text.splitlines()[0][:300]
        time.sleep(4 * self._interval)  # for the others to read it: process 0 takes the service with it
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
                    self._leave(f"{fate}; start the job again, it goes on from the last checkpoint", EXIT_LOST)
            self._exchange()  # that it has ended
        except jax.errors.JaxRuntimeError as error:
            reason = str(error).splitlines()[0][:200]
            self._leave(
                f"process 0 of {self._count} is lost: its coordination service does not answer ({reason}); start the "
                "job again, it goes on from the last checkpoint",
                EXIT_LOST,
            )

    def _exchange(self) -> list[Report]:
        """Tells where this process stands, and reads where all stand."""
        self._beat += 1
        place, step, began = self._place
        seconds = time.monotonic() - began
        own = Report(self._process, HOST, self._beat, place, step, seconds, self._failure, self._ended)
        text = json.dumps(dataclasses.asdict(own))
        self._client.key_value_set(f"{BEATS}{self._process}", text, allow_overwrite=True)
        return [Report(**json.loads(value)) for _, value in self._client.key_value_dir_get(BEATS)]

    def _judge(self, reports: list[Report]) -> str | None:
        """Which process the job has to end for, in words."""
        now = time.monotonic()
        for report in reports:
            beat, when = self._heard.get(report.process, (0, now))
            if report.beat != beat:
                self._heard[report.process] = report.beat, now
            # A failure that this process shares, such as a wrong setting, it had rather tell itself.
            if report.failure and now - self._failed.setdefault(report.process, now) > 1.5 * self._interval:
                return f"{self._name(report)} ended: {report.failure}"
            if report.beat == beat and now - when > self._timeout and not (report.ended or report.failure):
                silent = f"no sign of life for {now - when:.0f} s"
                return f"{self._name(report)} is lost: {silent}, last seen {report.place}, step {report.step}"
        # Who waits for another is not to blame: it is the one behind all others, of equals the one that came last.
        last = min(reports, key=lambda report: (report.step, PLACES.index(report.place), report.seconds))
        if last.seconds > self._timeout and last.place not in PATIENT:
            return f"{self._name(last)} hangs {last.place}, step {last.step}, for more than {self._timeout:g} s"
        return None

    def _name(self, report: Report) -> str:
        return f"process {report.process} of {self._count} ({report.host})"

    def _say_goodbye(self) -> None:
        self._last_words.communicate(exit_watchdog.GOODBYE.encode())

    def _leave(self, message: str, code: int) -> None:
        print(f"\nemu-jax train: {message}", file=sys.stderr, flush=True)  # a progress bar may stand in the line
        self._say_goodbye()
        os._exit(code)  # an orderly exit would wait for the lost one
