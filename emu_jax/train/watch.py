"""The watch: a thread in every process, which names the process that is lost or hangs, and ends its own.

The loop records every phase of a step that it enters (`heartbeat`). A phase that lasts longer than its limit hangs; a
process of several that publishes no heartbeat for `EMU_JAX_TIMEOUT` is lost. Environment variables set the limits, in
seconds:

    EMU_JAX_TIMEOUT=90              silence of a process; a step, or more: 5 times the median of the last ones
    EMU_JAX_TIMEOUT_STARTING=3600   opening the data, initialising or restoring the state
    EMU_JAX_TIMEOUT_COMPILING=3600  compiling the step, and its first two runs, from which the others are measured
    EMU_JAX_TIMEOUT_READING=900     waiting for a batch; storage may be silent for 600 (`buckets.py`)
    EMU_JAX_TIMEOUT_OBSERVING=3600  evaluating while a run trains (`config.eval`, `--score-every`)
    EMU_JAX_TIMEOUT_SAVING=3900     saving a checkpoint; longer than `config.train.save_timeout_minutes`

Heartbeats are exchanged through JAX's coordination service. Without the watch, a collective operation that waits for a
lost process would never return. The last words of a process that hangs are the stacks of its threads.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from emu_jax.ending import ending
from emu_jax.errors import EXIT_AGAIN, EXIT_LOST, UserError
from emu_jax.train import aborts, exit_watchdog

TIMEOUT = "EMU_JAX_TIMEOUT"
HEARTBEATS = "emu_jax/heartbeats/"  # key prefix in the coordination service
HOST = socket.gethostname()
# Phases of a process, in the order in which it enters them.
STARTING, COMPILING, READING, COMPUTING, OBSERVING, SAVING = PHASES = (
    *("starting", "compiling", "reading data", "computing", "observing", "saving"),
)
STEP_MULTIPLE = 5  # a step hangs when it takes so many times as long as the median of the last ones
# What hangs on CPUs uses no processor. A run that other processes keep from them uses at least 1 / STARVED of one.
STARVED = 10
MEASURED_STEPS = 16  # the last ones
STDERR = 2  # the file descriptor: in a notebook or a test, sys.stderr has none
RESUMES = "start it again to resume from the last checkpoint"


@dataclasses.dataclass(frozen=True)
class Timeouts:
    """Seconds after which a process is lost (`silence`), and after which it hangs in a phase.

    `computing` is the least limit of a step, which grows with the steps that are measured.
    """

    silence: float
    starting: float
    compiling: float
    reading: float
    computing: float
    observing: float
    saving: float

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Timeouts:
        """Those that the environment variables set.

        Raises:
          UserError: one is malformed.
        """
        silence = _seconds(environment, TIMEOUT, 90)
        defaults = {"starting": 3600, "compiling": 3600, "reading": 900, "observing": 3600, "saving": 3900}
        limits = {name: _seconds(environment, f"{TIMEOUT}_{name.upper()}", value) for name, value in defaults.items()}
        return cls(silence=silence, computing=silence, **limits)


def _seconds(environment: Mapping[str, str], name: str, default: float) -> float:
    text = environment.get(name, str(default))
    if not re.fullmatch(r"\d{1,6}(\.\d+)?", text) or float(text) < 5:
        raise UserError(f"{name}={text!r}; expected seconds, at least 5")
    return float(text)


class StepTimes:
    """Measures steps by how long the loop stays in `COMPUTING`.

    The loop dispatches a step and then waits for the one before it, so the first step only seems to be short. A step
    may have several heartbeats, such as one a micro-batch; then the longest of them counts.
    """

    def __init__(self) -> None:
        self._first: int | None = None
        self._last: dict[int, float] = {}  # seconds of the last steps

    def add(self, step: int, seconds: float) -> None:
        if self._first is None:
            self._first = step
        if step > self._first:
            self._last[step] = max(seconds, self._last.get(step, 0.0))
            self._last.pop(step - MEASURED_STEPS, None)

    def limit(self, step: int, timeouts: Timeouts) -> float:
        """Seconds that a step may take."""
        if self._first is None or step < self._first + 2:
            return timeouts.compiling
        return max(timeouts.computing, STEP_MULTIPLE * statistics.median(self._last.values()))


@dataclasses.dataclass(frozen=True)
class Report:
    """A process's heartbeat, as the others read it.

    Attributes:
      beat: count of its heartbeats.
      phase, step, seconds, limit: one of `PHASES`, its step, the time since the process entered it, and its limit.
      failure: why the process is about to exit; "" while it runs.
      ended: whether it has left the job in order.
    """

    process: int
    host: str
    beat: int
    phase: str
    step: int
    seconds: float
    limit: float
    failure: str
    ended: bool

    @property
    def where(self) -> str:
        return self.phase if self.phase in (STARTING, COMPILING) else f"{self.phase}, step {self.step}"


class _Entered(NamedTuple):
    """The phase that this process has entered.

    Attributes:
      at: when, by `time.monotonic`.
      paused: seconds for which the process had been paused by then.
      busy: seconds of processor time that it had used by then.
      limit: seconds that it may last.
    """

    phase: str
    step: int
    at: float
    paused: float
    busy: float
    limit: float


class Watch:
    """The thread; `distributed.job` makes one for a process.

    With several processes it publishes this process's reports and reads those of the others.
    """

    def __init__(self, timeouts: Timeouts):
        from jax._src.distributed import global_state  # the only access to the service that JAX has started

        self._timeouts, self._steps = timeouts, StepTimes()
        self._client: Any = global_state.client  # None in the only process
        self._coordinator = str(global_state.coordinator_address)
        self._process, self._count = 0, 1
        if self._client is not None:
            self._process, self._count = jax.process_index(), jax.process_count()
        # Every process reads all reports: the more processes, the longer the interval.
        self._interval = min(timeouts.silence / 20, max(1.0, self._count / 64))
        self._paused = 0.0
        self._entered = _Entered(STARTING, 0, time.monotonic(), 0.0, time.process_time(), timeouts.starting)
        self._failure, self._ended, self._beat = "", False, 0
        self._last_words: tuple[str, int] | None = None  # message and exit code, from when this process knows its end
        self._heard: dict[int, tuple[int, float]] = {}  # newest beat of each process, and when it was read
        self._failed: dict[int, float] = {}  # when the failure of a process was read
        self._stopping = threading.Event()
        faulthandler.enable(STDERR)  # the stacks of a process that crashes
        if self._client is not None:
            aborts.handle(self._on_abort)
            names = [str(self._process), str(self._count)]
            self._exit_watchdog = subprocess.Popen(
                [sys.executable, "-S", exit_watchdog.__file__, *names], stdin=subprocess.PIPE, start_new_session=True
            )
        self._thread = threading.Thread(target=self._run, name="emu-jax-watch", daemon=True)
        self._thread.start()

    def heartbeat(self, phase: str, step: int) -> None:
        now, last = time.monotonic(), self._entered
        if last.phase == COMPUTING:
            self._steps.add(last.step, now - last.at)
        limits = {STARTING: self._timeouts.starting, COMPILING: self._timeouts.compiling}
        limits |= {READING: self._timeouts.reading, SAVING: self._timeouts.saving, OBSERVING: self._timeouts.observing}
        limit = self._steps.limit(step, self._timeouts) if phase == COMPUTING else limits[phase]
        self._entered = _Entered(phase, step, now, self._paused, time.process_time(), limit)

    def await_save(self) -> None:
        """Enters `SAVING` in the newest step: the run ends, in order or by an error, and waits for unfinished saves."""
        self.heartbeat(SAVING, self._entered.step)

    def close(self) -> None:
        """Leaves the job together with all other processes."""
        self._ended = True
        self._stopping.set()
        self._thread.join()
        if self._client is not None:
            jax.distributed.shutdown()
            aborts.reset()
        self._say_goodbye()

    def fail(self, error: BaseException) -> None:
        """Ends this process where an orderly exit might never end: it would wait for other processes, or for storage.

        A process of several first publishes its reason.
        """
        if self._client is not None and (isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in str(error)):
            # Most likely another process is lost; the thread is about to find out which one and to end this process.
            time.sleep(self._timeouts.silence + 3 * self._interval)
        code, line = ending(error)
        if self._client is None:
            if code == EXIT_AGAIN:
                self._leave(line, code)
            return
        if not line:
            traceback.print_exception(error)
            line = f"{type(error).__name__}: {error}"
        self._failure, self._last_words = line.splitlines()[0][:300], (line, code)
        time.sleep(4 * self._interval)  # so that the others read it: the service ends with process 0
        self._leave(line, code)

    def _run(self) -> None:
        checked = time.monotonic()
        try:
            while not self._stopping.wait(self._interval):
                now = time.monotonic()
                # Where this thread did not run either, the process was stopped, or its machine slept.
                self._paused += now - checked if now - checked > 5 * self._interval else 0.0
                checked = now
                if self._client is not None:
                    # If no thread of Python runs any more, because one of them keeps its lock, C code ends the process.
                    faulthandler.dump_traceback_later(self._timeouts.silence, exit=True, file=STDERR)
                reports = self._exchange()
                fate = None if self._failure else self._judge(reports)
                if fate is not None:
                    self._failure, self._last_words = fate, (f"{fate}; {RESUMES}", EXIT_LOST)
                    if self._client is not None:
                        self._exchange()
                        time.sleep(3 * self._interval)
                    self._leave(*self._last_words)
            self._exchange()  # publishes that it has ended
        except jax.errors.JaxRuntimeError as error:
            self._lose_coordinator(str(error).splitlines()[0][:200])
        finally:
            faulthandler.cancel_dump_traceback_later()

    def _exchange(self) -> list[Report]:
        """Publishes this process's report, and reads all reports."""
        self._beat += 1
        now = self._entered
        seconds = time.monotonic() - now.at - (self._paused - now.paused)
        alone = self._client is None and now.phase != STARTING  # before that, JAX may have no backend
        if alone and jax.default_backend() == "cpu":
            seconds = max(0.0, seconds - STARVED * (time.process_time() - now.busy))
        own = Report(
            *(self._process, HOST, self._beat, now.phase, now.step, seconds, now.limit, self._failure, self._ended)
        )
        if self._client is None:
            return [own]
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
            silent = now - when
            if report.beat == beat and silent > self._timeouts.silence and not (report.ended or report.failure):
                return f"{self._name(report)} is lost: no sign of life for {silent:.0f} s, last seen {report.where}"
        # The others wait for the process that is furthest behind; among equals, for the one that got there last.
        last = min(reports, key=lambda report: (report.step, PHASES.index(report.phase), report.seconds))
        if last.seconds <= last.limit:
            return None
        if (self._entered.step, self._entered.phase) == (last.step, last.phase):  # this process may be the cause, too
            faulthandler.dump_traceback(STDERR)
        return f"{self._name(last)} hangs {last.where}, for more than {last.limit:.0f} s"

    def _name(self, report: Report) -> str:
        return "the run" if self._count == 1 else f"process {report.process} of {self._count} ({report.host})"

    def _lose_coordinator(self, reason: str) -> None:
        """Ends this process, whose own reason, if it has one, is why process 0 has gone, too."""
        lost = f"process 0 of {self._count} is lost: its coordination service does not answer ({reason}); {RESUMES}"
        self._leave(*(self._last_words or (lost, EXIT_LOST)))

    def _on_abort(self) -> None:
        """JAX aborts a process at once when process 0 is lost; returns if that is not the cause."""
        if self._process:
            host, _, port = self._coordinator.rpartition(":")
            try:
                socket.create_connection((host, int(port)), timeout=5).close()
            except OSError as error:
                self._lose_coordinator(str(error))
        faulthandler.dump_traceback(STDERR)

    def _say_goodbye(self) -> None:
        if self._client is not None:
            self._exit_watchdog.communicate(exit_watchdog.GOODBYE.encode())

    def _leave(self, message: str, code: int) -> None:
        print(f"\nemu-jax train: {message}", file=sys.stderr, flush=True)  # a progress bar may fill the line
        self._say_goodbye()
        os._exit(code)  # an orderly exit would wait for what hangs
