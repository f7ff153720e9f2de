"""A run that hangs is named in bounded time, with the stacks of its threads; a run that is only slow is not.

Processes that train `tests/train/tiny.py`, where the task `tests/train/stalling.py` stalls.
"""

import faulthandler
import re

import pytest

from emu_jax.errors import EXIT_LOST, UserError
from emu_jax.train import watch
from emu_jax.train.watch import COMPUTING, READING, SAVING, Report, StepTimes, Timeouts
from tests.train.test_distributed import finish, message, start

TIMEOUTS = Timeouts(silence=90, starting=3600, compiling=3000, reading=900, computing=90, observing=3600, saving=3600)


def test_timeouts_of_the_environment():
    assert Timeouts.of({}) == Timeouts(90, 3600, 3600, 900, 90, 3600, 3900)
    changed = {"EMU_JAX_TIMEOUT": "20", "EMU_JAX_TIMEOUT_READING": "7.5", "EMU_JAX_TIMEOUT_SAVING": "8000"}
    assert Timeouts.of(changed) == Timeouts(20, 3600, 3600, 7.5, 20, 3600, 8000)
    with pytest.raises(UserError, match=r"EMU_JAX_TIMEOUT_SAVING='soon'; expected seconds, at least 5"):
        Timeouts.of({"EMU_JAX_TIMEOUT_SAVING": "soon"})


def test_a_step_may_take_five_times_as_long_as_the_median_of_the_last():
    """The first one only seems to be short: the loop waits for it in the second."""
    steps = StepTimes()
    assert [steps.limit(step, TIMEOUTS) for step in (41, 42)] == [3000, 3000]
    steps.add(41, 0.1)
    assert steps.limit(42, TIMEOUTS) == 3000
    steps.add(42, 1.0)
    steps.add(42, 95.0)  # of a step with several heartbeats the longest counts
    steps.add(42, 2.0)
    assert steps.limit(43, TIMEOUTS) == 475
    for step in range(43, 50):
        steps.add(step, 95.0)
    steps.add(50, 800.0)
    assert steps.limit(51, TIMEOUTS) == 475, "one slow step does not raise it"
    for step in range(51, 67):
        steps.add(step, 20.0)
    assert steps.limit(67, TIMEOUTS) == 100, "of the last 16 only"
    for step in range(67, 83):
        steps.add(step, 1.0)
    assert steps.limit(83, TIMEOUTS) == 90


@pytest.mark.parametrize("busy, seconds", [(0.0, 100.0), (2.0, 80.0), (15.0, 0.0)])
def test_a_run_that_is_kept_from_its_processors_is_slow_and_does_not_hang(monkeypatch, busy, seconds):
    """100 s in a phase, in which the only process used `busy` seconds of a CPU."""
    own = watch.Watch.__new__(watch.Watch)
    own._client, own._beat, own._paused, own._process, own._failure, own._ended = None, 0, 0.0, 0, "", False
    own._entered = watch._Entered(COMPUTING, 7, 1000.0, 0.0, 30.0, 90.0)
    monkeypatch.setattr(watch.time, "monotonic", lambda: 1100.0)
    monkeypatch.setattr(watch.time, "process_time", lambda: 30.0 + busy)
    (found,) = own._exchange()
    assert found.seconds == seconds
    own._entered = watch._Entered(watch.STARTING, 0, 1000.0, 0.0, 30.0, 90.0)
    assert own._exchange()[0].seconds == 100.0, "before JAX has a backend"


def report(process: int, phase: str, step: int, seconds: float, limit: float) -> Report:
    return Report(process, "host", 1, phase, step, seconds, limit, "", False)


@pytest.fixture
def judge(monkeypatch):
    """The judgement of process 0 of three, which computes step 7."""
    monkeypatch.setattr(faulthandler, "dump_traceback", lambda file: None)
    own = watch.Watch.__new__(watch.Watch)
    own._timeouts, own._interval, own._count = TIMEOUTS, 1.0, 3
    own._entered = watch._Entered(COMPUTING, 7, 0.0, 0.0, 0.0, 90.0)
    own._heard, own._failed = {}, {}
    return lambda *reports: own._judge(list(reports))


def test_the_process_that_the_others_wait_for_is_named(judge):
    waiting = [report(0, COMPUTING, 7, 800, 90), report(2, COMPUTING, 7, 801, 90)]
    assert judge(*waiting, report(1, READING, 7, 899, 900)) is None
    expected = "process 1 of 3 (host) hangs reading data, step 7, for more than 900 s"
    assert judge(*waiting, report(1, READING, 7, 901, 900)) == expected
    expected = "process 1 of 3 (host) hangs saving, step 6, for more than 3600 s"
    assert judge(*waiting, report(1, SAVING, 6, 3601, 3600)) == expected
    expected = "process 1 of 3 (host) hangs computing, step 7, for more than 90 s"
    assert judge(*waiting, report(1, COMPUTING, 7, 91, 90)) == expected, "the last to get there"


# STALL, the phase that is named, and a function in its stack: a step blocks its caller, or the one who waits for it.
HANGS = {
    "reading": ("reading:6:600", "reading data, step 5, for more than 16 s", "__next__"),
    "computing": ("computing:5:600", "computing, step 5, for more than 15 s", "(__call__|block_until_ready)"),
    "saving": ("saving:4:600", "saving, step 3, for more than 17 s", "get_state"),
}


@pytest.mark.slow
@pytest.mark.parametrize("phase", HANGS)
@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_that_hangs_is_named(documents, tmp_path, phase, processes):
    stall, words, function = HANGS[phase]
    limits = {"EMU_JAX_TIMEOUT": "15", "EMU_JAX_TIMEOUT_READING": "16", "EMU_JAX_TIMEOUT_SAVING": "17"}
    task = "--config.objective=tests.train.stalling:Stalling"
    started = start(tmp_path / "run", documents, task, processes=processes, STALL=stall, **limits)
    for code, error in finish(started):
        assert code == EXIT_LOST, error
        who = "the run" if processes == 1 else r"process "
        assert who in message(error) and f"hangs {words}" in message(error), error
        assert message(error).endswith("start it again to resume from the last checkpoint")
    assert re.search(f"in {function}$", error, re.MULTILINE), error
