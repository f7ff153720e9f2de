"""The training loop: config and work directory -> a trained checkpoint, metrics and plots.

workdir/ config.json  checkpoints/<step>/  metrics.jsonl  goodput.jsonl  starts.jsonl  tensorboard/  plots/  profile/
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from emu_jax.buckets import retries
from emu_jax.checkpoints.store import FOLDER
from emu_jax.config import to_json
from emu_jax.data.pipeline import DIVISION
from emu_jax.data.tokenizer import Tokenizer
from emu_jax.errors import UserError, check_fields
from emu_jax.observation import NOTHING, Observe, merged
from emu_jax.sharding import make_mesh
from emu_jax.storage import Path, is_bucket, is_mounted_bucket, replace_text
from emu_jax.train import distributed, watch
from emu_jax.train.bad_step_report import BadStepReport
from emu_jax.train.best_step import BestStep
from emu_jax.train.changes import (
    Differences,
    changed_mixture,
    check_change,
    differences,
    fields_of,
    is_changeable,
    record,
)
from emu_jax.train.checkpoint import Checkpoints, Rotation, SaveTimer
from emu_jax.train.compiler import compiler_options
from emu_jax.train.fit import fit
from emu_jax.train.global_batch import place_batch
from emu_jax.train.held_out_losses import PREFIX, EvalConfig, HeldOutLosses
from emu_jax.train.init_from import check_init, init_from_checkpoints
from emu_jax.train.interval import Interval, next_batch_of
from emu_jax.train.lease import hold
from emu_jax.train.metrics import Goodput, MetricsWriter, Trace, plot_metrics
from emu_jax.train.optimizer import OptimizerConfig
from emu_jax.train.starts import add_start, describe
from emu_jax.train.state import TrainState, abstract_state, averaged, create_state
from emu_jax.train.step import Step, compile_step
from emu_jax.train.tasks.task import Batch, Inputs, Task, make_task
from emu_jax.train.trackers import TrackedRun, default_name, find_tracker
from emu_jax.workdir import CONFIG_FILE, check_scheme, with_recorded_shards

log = logging.getLogger(__name__)

RESHARDING = ("data.shards", "data.workers")  # fields that may also change when a run is resumed with reshard_data
MEASURED_STEPS = 24  # timed to turn minutes into steps


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """`config.train`.

    Attributes:
      steps, minutes: length of the run, by one of them. Minutes start with the call of `train` (compilation included)
        and are turned into a number of steps once, before the first step.
      seed: seed of fresh parameters, dropout and noise.
      log_every, checkpoint_every: intervals in steps; the last step is always logged and saved.
      checkpoint_minutes: longest time between two checkpoints, beside `checkpoint_every`; 0 counts steps alone. It is
        looked at every `log_every` steps, by the clock of process 0.
      keep_checkpoints: number of newest checkpoints to keep; 2 or more, as `checkpoint.Rotation` says.
      keep_every: interval in steps of checkpoints that are saved and kept for ever; 0 keeps none for ever.
      save_timeout_minutes: time after which a save that has not ended is an error.
      max_bad_steps: bad steps in a row (`bad_steps.py`) that stop the run.
      mesh: sizes of the mesh axes (`sharding.make_mesh`); `fit.py` fills in those of 0.
      fits: what fits a device, by its kind (`fit.Fit`).
      tuned: pass the options of `compiler.py` to the compiler.
    """

    steps: int
    minutes: float
    seed: int
    log_every: int
    checkpoint_every: int
    keep_checkpoints: int
    mesh: Any
    max_bad_steps: int = 10
    tuned: bool = False
    checkpoint_minutes: float = 0.0
    keep_every: int = 0
    save_timeout_minutes: float = 60.0
    fits: Any = None

    def __post_init__(self):
        if min(self.steps, self.minutes) < 0 or bool(self.steps) == bool(self.minutes):
            raise UserError(
                f"config.train.steps={self.steps}, config.train.minutes={self.minutes}; expected one of them above 0, "
                "and the other 0"
            )
        for name, least in (("log_every", 1), ("checkpoint_every", 1), ("keep_checkpoints", 2), ("max_bad_steps", 1)):
            if getattr(self, name) < least:
                raise UserError(f"config.train.{name}={getattr(self, name)}; expected at least {least}")
        for name in ("checkpoint_minutes", "keep_every"):
            if getattr(self, name) < 0:
                raise UserError(f"config.train.{name}={getattr(self, name)}; expected 0 (none) or more")
        if self.save_timeout_minutes <= 0:
            raise UserError(f"config.train.save_timeout_minutes={self.save_timeout_minutes}; expected more than 0")

    def saves_at(self, step: int) -> bool:
        """Whether this step's state is saved, whatever the time."""
        return step % self.checkpoint_every == 0 or (self.keep_every > 0 and step % self.keep_every == 0)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> TrainConfig:
        check_fields(cls, "config.train", fields)
        return cls(**dict(fields))


@dataclasses.dataclass(frozen=True)
class Scoring:
    """What is scored while a run learns, beside its losses.

    Attributes:
      every: interval in steps; the last step is scored too.
      make: the task and its tokenizer -> what observes the model; called once.
    """

    every: int
    make: Callable[[Task, Tokenizer | None], Observe]

    def __post_init__(self):
        if self.every < 1:
            raise UserError(f"score_every={self.every}; expected at least 1")
        if jax.process_count() > 1:
            raise UserError("score_every: only a run of one process scores while it learns; evaluate its checkpoints")


@dataclasses.dataclass(frozen=True)
class Setup:
    """Everything that follows from a config; `make` refuses all settings that cannot work.

    Attributes:
      first: this process's rows of the first batch, for whose shapes the step is compiled.
    """

    settings: TrainConfig
    optimizer: OptimizerConfig
    mesh: Mesh
    task: Task
    inputs: Inputs
    first: dict[str, np.ndarray]

    @classmethod
    def make(cls, config: ConfigDict) -> Setup:
        config = fit(config, jax.devices())
        settings = TrainConfig.from_dict(config.train)
        optimizer = OptimizerConfig.from_dict(config.optimizer)
        mesh = make_mesh(settings.mesh)
        task, inputs = make_task(config, mesh)
        if task.rows % optimizer.accumulate_steps:
            raise UserError(
                f"the batch of {task.rows} rows does not divide by "
                f"config.optimizer.accumulate_steps={optimizer.accumulate_steps}"
            )
        position = inputs.stream.get_state()
        first = next_batch_of(inputs.stream)  # refuses images that cannot be read
        inputs.stream.set_state(position)
        return cls(settings, optimizer, mesh, task, inputs, first)

    def placed(self, batch: dict[str, np.ndarray]) -> Batch:
        """This process's rows of a batch -> global arrays on the mesh."""
        return self.task.batch(**place_batch(self.mesh, self.task.rows, batch))

    def compile(self, state: TrainState, batch: Batch) -> Step:
        options = compiler_options(self.mesh.devices.flat[0].device_kind, self.settings.tuned)
        return compile_step(self.task, self.optimizer, self.settings.seed, state, batch, options)


def train(
    config: ConfigDict,
    workdir: Path,
    *,
    profile: range = range(0),
    reshard_data: bool = False,
    change: Collection[str] = (),
    skip_windows: int = 0,
    scoring: Scoring | None = None,
    track: Sequence[str] = (),
    name: str = "",
) -> TrainState:
    """Trains `config` in `workdir`, or resumes the run there from its newest checkpoint.

    A run starts from the first of these that there is:
      1. the newest checkpoint in workdir/checkpoints that is not corrupt (parameters, optimizer, step, position in the
         data, and the total number of steps), on any mesh; a finished run is left as it is;
      2. the parts that config.init names (`init_from.py`), the other parameters fresh;
      3. fresh parameters from config.train.seed.

    Every process calls it (`distributed.py`). The first one writes all files, except that each writes its own part of
    the checkpoints.

    Args:
      profile: steps to trace for xprof, into workdir/profile.
      reshard_data: resume a run that had other `data.shards` or `data.workers`, near its position in the data.
      change: fields of the config, with dots, that may differ from the work directory's (`changes.py`).
      skip_windows: windows of the data to have left out, counted over the whole run, so that starting it again leaves
        out no more.
      scoring: what is scored while the run learns.
      track: names of trackers (`trackers.py`), which get the metrics too. name: the run's name there; by default that
        of the work directory.

    Raises:
      UserError: a setting cannot work, or the work directory belongs to another config.
      distributed.Preempted: SIGTERM stopped the run, and its state is saved.
      distributed.Diverged: so many steps in a row were bad that the run stopped, or the state is not finite; the
        checkpoints are good.
    """
    began = time.time()
    first_process = jax.process_index() == 0
    # ---- settings: refused before anything is written ---------------------------------------------------------------
    setup = Setup.make(config if reshard_data else with_recorded_shards(config, workdir))
    settings, task, mesh, config = setup.settings, setup.task, setup.mesh, setup.inputs.config
    stream, tokenizer = setup.inputs.stream, setup.inputs.tokenizer
    if settings.steps and profile and profile[-1] > settings.steps:
        raise UserError(
            f"profile_steps={profile[0]}:{profile[-1]}: the run ends after config.train.steps={settings.steps}"
        )
    evaluation = EvalConfig.of(config)
    losses_of = HeldOutLosses(evaluation, task, setup.inputs, mesh) if evaluation.every else None
    scores = scoring.make(task, tokenizer) if scoring else None
    for tracker in track:
        find_tracker(tracker)
    changed = check_workdir(workdir, config, (*change, *(RESHARDING if reshard_data else ())))
    if change and not (workdir / CONFIG_FILE).exists():
        raise UserError(f"change={', '.join(change)}: workdir={workdir} holds no run yet; set the fields themselves")
    check_writable(workdir)
    if not (workdir / CONFIG_FILE).exists():  # a resumed run no longer reads config.init
        check_init(config, task.init_parts)
    for remark in setup.inputs.remarks if first_process else ():
        print(remark, file=sys.stderr)
    if first_process and isinstance(workdir, pathlib.Path) and is_mounted_bucket(workdir):
        print(f"workdir={workdir} is a mounted bucket: saves may fail there; name gs://… instead", file=sys.stderr)
    goodput = Goodput(workdir / "goodput.jsonl" if first_process else None, began)

    best: BestStep | None = None  # made below, once the step from which the run starts is known
    rotation = Rotation(settings.keep_checkpoints, settings.keep_every, lambda: best.kept if best else ())
    # Leaving this block waits for the last save: only there does a full disk raise.
    with (
        contextlib.closing(stream),
        contextlib.closing(losses_of) if losses_of else contextlib.nullcontext(),
        hold(workdir) as check_lease,
        Checkpoints(workdir, rotation, timeout=settings.save_timeout_minutes * 60) as checkpoints,
        jax.set_mesh(mesh),
        distributed.Preemption() as preemption,
        distributed.saves_at_exit(),
        contextlib.ExitStack() as at_exit,
    ):
        # ---- state: restored or fresh -----------------------------------------------------------------------------
        fresh = _newest_step(checkpoints, workdir) is None
        if fresh:
            words = tokenizer.role_words if tokenizer is not None else {}
            state = create_state(task, setup.optimizer, settings.seed, mesh)
            state = init_from_checkpoints(state, config, task.init_parts, words)
            stream.resume(stream.get_state(), skip_windows=skip_windows)
        else:
            target = abstract_state(task, setup.optimizer, mesh)
            found = checkpoints.restore(target, tokenizer)
            since = check_checkpoint(workdir, found.step, found.meta["config"], config)
            differing = (*(DIVISION if reshard_data else ()), *(("mixture",) if changed_mixture(since) else ()))
            skipped = stream.resume(found.meta["iterator"], differing=differing, skip_windows=skip_windows)
            corrupt = {step: f"the checkpoint is corrupt: {what}" for step, what in found.corrupt.items()}
            for line in checkpoints.set_aside(corrupt):
                if first_process:
                    print(line, file=sys.stderr)
            state = _with_length(found.state, settings.steps)
            if first_process and (changed or skipped):
                record(workdir, found.step, changed, skipped)
            if first_process and (changed or not (workdir / CONFIG_FILE).exists()):
                write_config(workdir, config)
            log.info("resumed %s at step %d of %d", workdir, int(state.step), int(state.total_steps))
        best = BestStep(evaluation, workdir, int(state.step), checkpoints.steps())
        if not fresh and (state.step >= state.total_steps or best.ends(int(state.step))):
            return state

        # ---- compile: one shape, one program; another shape is an error --------------------------------------------
        distributed.heartbeat(watch.COMPILING, 0)
        batch = setup.placed(setup.first)
        started = time.monotonic()
        with goodput.losing("compile_s"):
            compiled = setup.compile(state, batch)
        compile_seconds = time.monotonic() - started
        log.info("compiled the step in %.1f s", compile_seconds)

        # ---- length: a run keeps the number of steps that its first start has set ----------------------------------
        if fresh:
            total = settings.steps or measure_steps(compiled, state, batch, settings.minutes * 60, began)
            total = distributed.broadcast_from_process_0(total)  # each process has timed the steps by its own clock
            state = _with_length(state, total)
            if first_process:
                write_config(workdir, config)
            distributed.heartbeat(watch.SAVING, 0)
            position = distributed.merge_across_processes(stream.get_state())
            checkpoints.save(state, to_json(config), tokenizer, position, holds=task.holds)
        start, total = int(state.step), int(state.total_steps)

        # ---- train: a step is dispatched before the results of the previous one are read ---------------------------
        losses = task.plots.get("losses", ())
        writer = None
        if first_process:
            facts = describe(start, stream.get_state().get("fingerprint", {}))
            run = TrackedRun(name or default_name(workdir), add_start(workdir, facts), workdir, config, facts)
            writer = MetricsWriter(run, start=start, total=total, losses=losses, track=track)
            at_exit.callback(writer.close_bar)  # what is printed after an error begins a line
        trace = Trace(workdir, profile if first_process else range(0))
        timer = SaveTimer(settings.checkpoint_minutes * 60)
        interval = Interval(task.flops())
        bad_steps = BadStepReport(settings.max_bad_steps, stream)
        saved, diverged, enough = start, "", ""
        goodput.start(start)
        for step in range(start + 1, total + 1):
            distributed.heartbeat(watch.READING, step)
            trace.begin(step)
            before = stream.get_state() if setup.optimizer.accumulate_steps > 1 else {}
            with goodput.losing("input_wait_s"):
                batch = interval.next_batch(stream)
            distributed.heartbeat(watch.COMPUTING, step)
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                state, metrics = compiled(state, setup.placed(batch), preemption.reached)
            diverged = bad_steps.check()  # waits for the previous step; otherwise batches would pile up on the device
            dropped = metrics is None
            saving = step == total or settings.saves_at(step)
            if metrics is None:
                step, stopping = step - 1, True
            else:
                bad_steps.add(step, metrics, stream.records)
                trace.end(step, metrics)
                row, seen, improved = None, NOTHING, False
                if step % settings.log_every == 0 or step == total:
                    row = interval.finish() | {"compile_s": compile_seconds}
                    saving |= timer.due()
                    if is_bucket(workdir):
                        row |= {"storage_retries": retries()}
                    if first_process:
                        trace.look_for_request(step)
                observers = [
                    observe
                    for every, observe in ((evaluation.every, losses_of), (scoring.every if scoring else 0, scores))
                    if observe and (step % every == 0 or step == total)
                ]
                if observers:
                    distributed.heartbeat(watch.OBSERVING, step)
                    with goodput.losing("scoring_s"), interval.paused():
                        weights, statistics = averaged(state)
                        seen = merged([observe(step, weights, statistics) for observe in observers])
                        row = {**(row or {}), **seen.numbers}
                    improved, enough = best.improves(step, seen.numbers), best.ends(step) if step < total else ""
                    saving |= improved or bool(enough)
                if writer is not None:
                    writer.add(step, metrics, row, seen)
                stopping = preemption.reached() and step < total
                if saving or stopping:
                    diverged = diverged or bad_steps.check()
            if diverged:
                # A step may be finite and spoil the state, which only the next one shows.
                if start < saved == bad_steps.first - 1:
                    diverged += f"; {checkpoints.doubt(saved)}"
                break
            # After a bad step the last good one may have spoilt the state: the checkpoints before are better.
            if (saving or stopping) and (step == total or not bad_steps.in_a_row):
                distributed.heartbeat(watch.SAVING, step)
                check_lease()
                if writer is not None:
                    writer.commit()  # rows are on disk before their checkpoint
                with goodput.losing("checkpoint_s"):
                    if step > saved:
                        position = distributed.merge_across_processes(before if dropped else stream.get_state())
                        checkpoints.save(state, to_json(config), tokenizer, position, holds=task.holds)
                        saved = step
                    if step == total or stopping or improved or enough:
                        checkpoints.wait()
                    if improved:
                        best.saved()
                timer.restart()
                goodput.write(step)
            if stopping or enough:
                break

        trace.close()
        if writer is not None:
            writer.close()

    if diverged:
        raise distributed.Diverged(diverged)
    if enough:
        if first_process:
            print(enough, file=sys.stderr)
    elif stopping:
        raise distributed.Preempted(f"asked to stop after step {step} of {total}: saved; run it again to resume")

    # ---- curves, once the last checkpoint is on disk ----------------------------------------------------------------
    if first_process:
        plot_metrics(workdir, {**task.plots, "held_out": [f"{PREFIX}{name}" for name in losses]})
    return state


def compile_only(config: ConfigDict, workdir: Path, *, change: Collection[str] = ()) -> str:
    """Compiles the step that `train` would run; returns its time and memory as text, and writes nothing.

    Args:
      change: as in `train`.

    Raises:
      UserError: a setting cannot work, or the work directory belongs to another config.
    """
    setup = Setup.make(with_recorded_shards(config, workdir))
    check_workdir(workdir, setup.inputs.config, change)
    with contextlib.closing(setup.inputs.stream), jax.set_mesh(setup.mesh):
        state = abstract_state(setup.task, setup.optimizer, setup.mesh)
        batch = setup.placed(setup.first)
        started = time.monotonic()
        step = setup.compile(state, batch)
        seconds = time.monotonic() - started
    found = [_memory(executable) for executable in step.executables]
    needed = max(found, key=lambda parts: sum(parts.values()))  # what is kept is an argument of each
    listed = ", ".join(f"{name} {size / 1e9:.3f}" for name, size in needed.items())
    return (
        f"compiled the step in {seconds:.1f} s for {jax.device_count()} devices of {jax.process_count()} processes\n"
        f"memory of a device, GB: {sum(needed.values()) / 1e9:.3f} ({listed})"
    )


def _memory(executable: jax.stages.Compiled) -> dict[str, int]:
    """Bytes of a device while a program runs.

    Raises:
      UserError: the compiler does not report them.
    """
    memory = executable.memory_analysis()
    if memory is None:
        raise UserError("this platform's compiler does not report the memory of a program; train without compile_only")
    return {
        "arguments": memory.argument_size_in_bytes,
        "results": memory.output_size_in_bytes - memory.alias_size_in_bytes,  # most reuse the arguments' memory
        "temporary": memory.temp_size_in_bytes,
        "program": memory.generated_code_size_in_bytes,
    }


def _newest_step(checkpoints: Checkpoints, workdir: Path) -> int | None:
    """The newest checkpoint's step.

    Raises:
      UserError: processes see different checkpoints.
    """
    newest = checkpoints.latest_step()
    steps = distributed.allgather(-1 if newest is None else newest)
    if len(set(steps)) > 1:
        process = next(i for i, step in enumerate(steps) if step != steps[0])
        raise UserError(
            f"workdir={workdir}: process 0 sees step {steps[0]} as its newest checkpoint, process {process} step "
            f"{steps[process]} (-1: none); expected one folder that all processes share"
        )
    return newest


def check_workdir(workdir: Path, config: ConfigDict, changeable: Collection[str] = ()) -> Differences:
    """Checks that the work directory is this experiment's, or new; writes nothing.

    Args:
      changeable: fields that may differ, beside `OBSERVING`.

    Returns:
      those that do.

    Raises:
      UserError: it belongs to another experiment, or is no folder; or no run may change one of these fields.
    """
    check_scheme(workdir)
    try:
        workdir.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:  # a name that is too long, say
        raise UserError(f"workdir={workdir}: cannot be read ({error.strerror}); name another folder") from error
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"workdir={workdir}: a file of that name exists; name a folder")
    file, here = workdir / CONFIG_FILE, fields_of(json.loads(to_json(config)))
    if not file.exists():
        return {}
    try:
        there = fields_of(json.loads(file.read_text(encoding="utf-8")))
    except ValueError as error:
        raise UserError(f"{file}: not JSON ({error}); expected the config that `emu-jax train` wrote") from error
    found = differences(there, here)
    for name, values in found.items():
        if name not in changeable:
            raise _other_config(f"workdir={workdir}", name, *values)
        if name not in RESHARDING:
            check_change(name, *values)
    return found


def check_checkpoint(workdir: Path, step: int, saved: Mapping[str, Any], config: ConfigDict) -> Differences:
    """Checks that a checkpoint is of this experiment; without config.json in the work directory, nothing else says so.

    Args:
      saved: the config in the checkpoint.

    Returns:
      the fields that have changed since.

    Raises:
      UserError: it belongs to another experiment.
    """
    found = differences(fields_of(saved), fields_of(json.loads(to_json(config))))
    recorded = (workdir / CONFIG_FILE).exists()  # what has changed on purpose is in it, and was compared with it
    for name, values in found.items():
        if name not in RESHARDING and not (recorded and is_changeable(name)):  # the stream compares its own division
            raise _other_config(f"{workdir / FOLDER / str(step)}", name, *values)
    return found


def _other_config(where: str, name: str, there: Any, here: Any) -> UserError:
    mend = ""
    if name in RESHARDING:
        mend = ", or reshard_data to resume near its position in the data"
    elif is_changeable(name):
        mend = ", or change this field on purpose (change)"
    return UserError(
        f"{where}: it belongs to another config: {name} is {there!r} there and {here!r} here; use a new work directory"
        + mend
    )


def check_writable(workdir: Path) -> None:
    """Checks that a work directory on a local disk can be made and written to; leaves nothing there.

    In a bucket there is nothing to make, and `lease.hold` is the first to write.

    Raises:
      UserError: it cannot.
    """
    for folder in () if is_bucket(workdir) else (workdir, workdir / FOLDER):
        while not folder.exists():
            folder = folder.parent
        try:  # asks the file system: permissions alone do not decide, least of all for root
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise UserError(
                f"workdir={workdir}: nothing can be written in {folder} ({error.strerror}); name a folder where you "
                "may write"
            ) from error


def write_config(workdir: Path, config: ConfigDict) -> None:
    """Makes the work directory this experiment's."""
    replace_text(workdir / CONFIG_FILE, to_json(config) + "\n")


def _with_length(state: TrainState, steps: int) -> TrainState:
    """The state of a run of so many steps in all; 0 leaves it as it is.

    Raises:
      UserError: it has had more.
    """
    if steps and steps < state.step:
        raise UserError(f"config.train.steps={steps}: the run has had {int(state.step)}; expected that or more")
    if not steps:
        return state
    return dataclasses.replace(state, total_steps=jnp.asarray(steps, jnp.int32, device=state.step.sharding))


def measure_steps(compiled: Step, state: TrainState, batch: Batch, seconds: float, began: float) -> int:
    """The number of steps that fill `seconds` since `began` (a time.time()); times steps on a copy of the state."""
    copy = jax.tree.map(jnp.copy, dataclasses.replace(state, total_steps=state.total_steps + MEASURED_STEPS))
    times = []
    for _ in range(MEASURED_STEPS):
        started = time.monotonic()
        copy, metrics = compiled(copy, batch)
        jax.block_until_ready(metrics)
        times.append(time.monotonic() - started)
    left = seconds - (time.time() - began)
    # The mean of the later half is the real rate on a shared machine; the first steps have page faults.
    return max(MEASURED_STEPS, int(left / np.mean(times[MEASURED_STEPS // 2 :])))
