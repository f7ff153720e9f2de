"""Several processes as one job: they start together, compute together, and end together.

On Cloud TPU VMs, GKE, Slurm and Open MPI the processes find one another. Elsewhere environment variables describe them:

    EMU_JAX_COORDINATOR=host:port   address of process 0      EMU_JAX_PROCESSES=N   EMU_JAX_PROCESS=0 … N-1

At the start they wait for one another three times as long as `EMU_JAX_TIMEOUT`, by which they then watch one another
(`watch.py`). A single process starts none of this but the watch.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from emu_jax.errors import EXIT_AGAIN, EXIT_DIVERGED, CommandError, UserError
from emu_jax.train.watch import Timeouts, Watch

COORDINATOR, PROCESSES, PROCESS = VARIABLES = ("EMU_JAX_COORDINATOR", "EMU_JAX_PROCESSES", "EMU_JAX_PROCESS")
# JAX's own timeout is longer by these seconds: JAX exits without naming the lost process.
JAX_TIMEOUT_MARGIN = 20


class Preempted(CommandError):
    """SIGTERM stopped the run, and its state is saved."""

    exit_code = EXIT_AGAIN  # an unhandled SIGTERM would exit with 143


class Diverged(CommandError):
    """Bad steps, or a state that is not finite, stopped the run, on all processes; its checkpoints are good."""

    exit_code = EXIT_DIVERGED


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
    """Joins the job's other processes, if there are any, watches them and itself, and leaves together with them.

    An error inside ends all processes of several: this one exits with the error's code, the others with `EXIT_LOST`.

    Raises:
      UserError: the environment is wrong, or the other processes did not join in time.
    """
    global _watch
    settings, timeouts = find_job(os.environ), Timeouts.of(os.environ)
    if settings is not None:
        _join(settings, timeouts.silence)
    _watch = Watch(timeouts)
    try:
        yield
    except (Preempted, Diverged, SystemExit):
        raise
    except BaseException as error:
        _watch.fail(error)
        raise
    finally:
        _watch.close()
        _watch = None


def _join(settings: dict[str, Any], timeout: float) -> None:
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


def heartbeat(phase: str, step: int) -> None:
    """Records which of `watch.PHASES` this process enters; the time of a phase starts anew."""
    if _watch is not None:
        _watch.heartbeat(phase, step)


@contextlib.contextmanager
def saves_at_exit() -> Iterator[None]:
    """Tells the watch that what follows the block, also after an error, waits for unfinished saves."""
    try:
        yield
    finally:
        if _watch is not None:
            _watch.await_save()


def broadcast_from_process_0(value: int) -> int:
    """Process 0's value, on every process."""
    return int(multihost_utils.broadcast_one_to_all(np.int32(value))) if jax.process_count() > 1 else value


def allgather(value: int) -> list[int]:
    """The value of every process, in their order, on every process."""
    return [int(v) for v in multihost_utils.process_allgather(np.int32(value))] if jax.process_count() > 1 else [value]


def gather(tree: dict[str, Any]) -> list[dict[str, Any]]:
    """The JSON-serialisable dict of every process, in their order, on every process."""
    if jax.process_count() == 1:
        return [tree]
    data = np.frombuffer(json.dumps(tree).encode(), np.uint8)
    sizes = allgather(len(data))
    padded = np.zeros(max(sizes), np.uint8)
    padded[: len(data)] = data
    rows = multihost_utils.process_allgather(padded)  # [processes, bytes]
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def merge_across_processes(tree: dict[str, Any]) -> dict[str, Any]:
    """The nested dicts of all processes merged into one, on every process; the lowest process wins where keys clash."""
    first, *others = gather(tree)
    for other in others:
        _merge(first, other)
    return first


def _merge(tree: dict[str, Any], other: dict[str, Any]) -> None:
    for key, value in other.items():
        if isinstance(value, dict) and isinstance(tree.get(key), dict):
            _merge(tree[key], value)
        else:
            tree.setdefault(key, value)


class Preemption:
    """Stops a run after SIGTERM; it is enough to signal one process of several.

    With several processes, JAX catches the signal.
    """

    def __enter__(self) -> Preemption:
        self._signalled, self._asked = False, 0
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

    def reached(self) -> bool:
        """Whether to stop now; the processes ask equally often, and all stop at the same time."""
        if jax.process_count() == 1:
            return self._signalled
        self._asked += 1  # JAX never stops a caller that leaves out a number
        return multihost_utils.reached_preemption_sync_point(self._asked)
