"""The training loop: config and work directory -> a trained checkpoint, metrics and plots.

workdir/ config.json  checkpoints/<step>/  metrics.jsonl  goodput.jsonl  tensorboard/  plots/  profile/
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from emu_jax.checkpoints.store import FOLDER
from emu_jax.config import to_json
from emu_jax.errors import UserError, check_fields
from emu_jax.sharding import make_mesh
from emu_jax.train import distributed
from emu_jax.train.checkpoint import Checkpoints
from emu_jax.train.compiler import compiler_options
from emu_jax.train.experiment import Experiment, make_experiment
from emu_jax.train.global_batch import batch_shardings, own_rows, put_rows
from emu_jax.train.init_from import check_init, init_from_checkpoints
from emu_jax.train.metrics import Goodput, Interval, MetricsWriter, NoWriter, Trace, next_batch_of, plot_metrics
from emu_jax.train.objective import Batch
from emu_jax.train.optimizer import OptimizerConfig
from emu_jax.train.state import TrainState, abstract_state, create_state
from emu_jax.train.step import compile_step
from emu_jax.workdir import CONFIG_FILE, OBSERVING

log = logging.getLogger(__name__)

# Fields that may differ beside `OBSERVING` when a run is resumed with its data divided anew.
RESHARDING = ("data.shards", "data.workers")
MEASURED_STEPS = 24  # timed to turn minutes into steps

Step = Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """`config.train`.

    Attributes:
      steps, minutes: how long to train; `steps` wins where it is not 0. `minutes` count from the call of `train`
        (compiling included) and are turned into a number of steps once, before the first one.
      log_every, checkpoint_every: in steps; the last step is always logged and saved.
      mesh: sizes of the mesh axes (`mesh.make_mesh`).
      tuned: give the compiler the options of `compiler.py`.
    """

    steps: int
    minutes: float
    seed: int
    log_every: int
    checkpoint_every: int
    keep_checkpoints: int
    mesh: Any
    tuned: bool = False

    def __post_init__(self):
        if min(self.steps, self.minutes) < 0 or not (self.steps or self.minutes):
            raise UserError(
                f"config.train.steps={self.steps}, config.train.minutes={self.minutes}; expected one of them above 0"
            )
        for name in ("log_every", "checkpoint_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise UserError(f"config.train.{name}={getattr(self, name)}; expected at least 1")

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> TrainConfig:
        check_fields(cls, "config.train", fields)
        return cls(**dict(fields))


@dataclasses.dataclass(frozen=True)
class Setup:
    """What follows from a config alone; everything that can be refused is refused while it is made.

    Attributes:
      first: the first batch, this process's rows; it says what the step is compiled for. position: before it.
    """

    settings: TrainConfig
    optimizer: OptimizerConfig
    mesh: Mesh
    experiment: Experiment
    position: dict[str, Any]
    first: dict[str, np.ndarray]

    @classmethod
    def make(cls, config: ConfigDict) -> Setup:
        settings = TrainConfig.from_dict(config.train)
        optimizer = OptimizerConfig.from_dict(config.optimizer)
        mesh = make_mesh(settings.mesh)
        experiment = make_experiment(config, mesh)
        if experiment.rows % optimizer.accumulate_steps:
            raise UserError(
                f"the batch of {experiment.rows} rows does not divide by "
                f"config.optimizer.accumulate_steps={optimizer.accumulate_steps}"
            )
        position = experiment.stream.get_state()
        first = next_batch_of(experiment.stream)  # refuses images that cannot be read
        experiment.stream.set_state(position)
        return cls(settings, optimizer, mesh, experiment, position, first)

    def placed(self, batch: dict[str, np.ndarray]) -> Batch:
        """This process's rows of a batch -> global arrays on the mesh."""
        rows, own = self.experiment.rows, own_rows(self.mesh, self.experiment.rows)
        shapes = {k: jax.ShapeDtypeStruct((rows, *v.shape[1:]), v.dtype) for k, v in batch.items()}
        shardings = batch_shardings(self.mesh, shapes)
        return self.experiment.objective.batch(**{k: put_rows(v, own, rows, shardings[k]) for k, v in batch.items()})

    def compile(self, state: TrainState, batch: Batch) -> jax.stages.Compiled:
        options = compiler_options(self.mesh.devices.flat[0].device_kind, self.settings.tuned)
        return compile_step(self.experiment.objective, self.optimizer, self.settings.seed, state, batch, options)


def train(config: ConfigDict, workdir: Path, *, profile: range = range(0), reshard_data: bool = False) -> TrainState:
    """Trains `config` in `workdir`, or continues there from its newest checkpoint.

    Where a run starts, first that applies:
      1. the newest checkpoint in workdir/checkpoints (parameters, optimizer, step, position in the data, and the
         number of steps in all), on whatever mesh; a finished run is left as it is;
      2. parameters of the parts that config.init names (`init_from.py`), the others fresh;
      3. fresh parameters from config.train.seed.

    Of several processes (`distributed.py`) all call it, and the first writes everything but its checkpoints' parts.

    Args:
      profile: steps to trace for xprof, into workdir/profile.
      reshard_data: go on near the place in the data where a run with other `data.shards` or `data.workers` stopped.

    Raises:
      UserError: a setting cannot work, or the work directory belongs to another config.
      distributed.Preempted: the run was asked to stop by SIGTERM, and has saved its state.
    """
    began = time.time()
    first_process = jax.process_index() == 0
    # ---- settings: refused before anything is written ---------------------------------------------------------------
    setup = Setup.make(config)
    settings, objective, stream = setup.settings, setup.experiment.objective, setup.experiment.stream
    tokenizer, mesh = setup.experiment.tokenizer, setup.mesh
    if settings.steps and profile and profile[-1] > settings.steps:
        raise UserError(
            f"--profile-steps {profile[0]}:{profile[-1]}: the run ends after config.train.steps={settings.steps}"
        )
    check_workdir(workdir, config, RESHARDING if reshard_data else ())
    check_writable(workdir)
    if not (workdir / CONFIG_FILE).exists():  # a resumed run needs its beginnings no more
        check_init(config)
    for remark in setup.experiment.remarks if first_process else ():
        print(remark, file=sys.stderr)
    goodput = Goodput(workdir / "goodput.jsonl" if first_process else None, began)

    # Leaving this block waits for the last save: a full disk shows nowhere else.
    with (
        contextlib.closing(stream),
        Checkpoints(workdir, keep=settings.keep_checkpoints) as checkpoints,
        jax.set_mesh(mesh),
        distributed.Preemption() as preemption,
    ):
        save = functools.partial(checkpoints.save, holds=objective.holds)
        # ---- state: restored or fresh -----------------------------------------------------------------------------
        fresh = _newest_step(checkpoints, workdir) is None
        if fresh:
            words = tokenizer.role_words if tokenizer is not None else {}
            state = create_state(objective, setup.optimizer, settings.seed, mesh)
            state = init_from_checkpoints(state, config, words)
        else:
            target = abstract_state(objective, setup.optimizer, mesh)
            state, position = checkpoints.restore(target, tokenizer)
            if reshard_data:
                stream.reshard(position)
                if first_process:
                    write_config(workdir, config)
            else:
                stream.set_state(position)
            log.info("resumed %s at step %d of %d", workdir, int(state.step), int(state.total_steps))
            if state.step >= state.total_steps:
                return state

        # ---- compile: one shape, one program; another shape is an error --------------------------------------------
        batch = setup.placed(setup.first)
        started = time.monotonic()
        with goodput.losing("compile_s"):
            compiled = setup.compile(state, batch)
        compile_seconds = time.monotonic() - started
        log.info("compiled the step in %.1f s", compile_seconds)

        # ---- how long: a run keeps the number of steps that it once measured ---------------------------------------
        if fresh:
            total = settings.steps or measure_steps(compiled, state, batch, settings.minutes * 60, began)
            total = distributed.agreed(total)  # every process has timed the steps by its own clock
            state = dataclasses.replace(state, total_steps=jnp.asarray(total, jnp.int32, device=state.step.sharding))
            if first_process:
                write_config(workdir, config)
            save(state, to_json(config), tokenizer, distributed.joined(stream.get_state()))
            checkpoints.wait()
        start, total = int(state.step), int(state.total_steps)

        # ---- train: the device is given a step before the results of the one before it are read --------------------
        writer = MetricsWriter(workdir, start=start, total=total) if first_process else NoWriter()
        trace = Trace(workdir / "profile", profile if first_process else range(0))
        interval = Interval(setup.experiment.flops)
        previous = None
        goodput.start(start)
        for step in range(start + 1, total + 1):
            distributed.at(distributed.READING, step)
            trace.begin(step)
            with goodput.losing("input_wait_s"):
                batch = interval.next_batch(stream)
            distributed.at(distributed.COMPUTING, step)
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                state, metrics = compiled(state, setup.placed(batch))
            jax.block_until_ready(previous)  # else batches would pile up on the device
            previous = metrics
            trace.end(step, metrics)
            writer.flush()
            writer.note(metrics)
            writer.advance()
            if step % settings.log_every == 0 or step == total:
                writer.hold(step, metrics, interval.finish() | {"compile_s": compile_seconds})
            stopping = preemption.reached(step) and step < total
            if step % settings.checkpoint_every == 0 or step == total or stopping:
                distributed.at(distributed.SAVING, step)
                writer.flush()  # a checkpoint's rows are on disk before it is
                with goodput.losing("checkpoint_s"):
                    save(state, to_json(config), tokenizer, distributed.joined(stream.get_state()))
                    if step == total or stopping:
                        checkpoints.wait()
                goodput.write(step)
            if stopping:
                break

        trace.close()
        writer.close()

    if stopping:
        raise distributed.Preempted(f"asked to stop after step {step} of {total}: saved; run again to go on")

    # ---- curves, once the last checkpoint is on disk ----------------------------------------------------------------
    if first_process:
        plot_metrics(workdir)
    return state


def compile_only(config: ConfigDict, workdir: Path) -> str:
    """Compiles the step that `train` would run, and describes it; writes nothing.

    Raises:
      UserError: a setting cannot work, or the work directory belongs to another config.
    """
    setup = Setup.make(config)
    check_workdir(workdir, config)
    with contextlib.closing(setup.experiment.stream), jax.set_mesh(setup.mesh):
        state = abstract_state(setup.experiment.objective, setup.optimizer, setup.mesh)
        batch = setup.placed(setup.first)
        started = time.monotonic()
        memory = setup.compile(state, batch).memory_analysis()
        seconds = time.monotonic() - started
    if memory is None:
        raise UserError("--compile-only: this platform's compiler does not tell what memory a program needs")
    parts = {
        "arguments": memory.argument_size_in_bytes,
        "results": memory.output_size_in_bytes - memory.alias_size_in_bytes,  # most take the arguments' place
        "temporary": memory.temp_size_in_bytes,
        "program": memory.generated_code_size_in_bytes,
    }
    listed = ", ".join(f"{name} {size / 1e9:.3f}" for name, size in parts.items())
    return (
        f"compiled the step in {seconds:.1f} s for {jax.device_count()} devices of {jax.process_count()} processes\n"
        f"memory of a device, GB: {sum(parts.values()) / 1e9:.3f} ({listed})"
    )


def _newest_step(checkpoints: Checkpoints, workdir: Path) -> int | None:
    """The newest checkpoint's step; raises where processes see different ones."""
    newest = checkpoints.latest_step()
    steps = distributed.gathered(-1 if newest is None else newest)
    if len(set(steps)) > 1:
        process = next(i for i, step in enumerate(steps) if step != steps[0])
        raise UserError(
            f"--workdir {workdir}: its newest checkpoint is of step {steps[0]} for process 0, of step {steps[process]} "
            f"for process {process} (-1: none); expected one folder that all processes share"
        )
    return newest


def check_workdir(workdir: Path, config: ConfigDict, free: Sequence[str] = ()) -> None:
    """Raises when the work directory belongs to another experiment; writes nothing. Fields of `free` may differ."""
    if workdir.parts[:1] and workdir.parts[0].endswith(":"):  # as in gs://…, which would become a folder here
        raise UserError(f"--workdir {workdir}: expected a folder; mount the bucket or a file share, and name that")
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"--workdir {workdir}: a file of that name exists; name a folder")
    file = workdir / CONFIG_FILE
    if not file.exists():
        return
    try:
        old = _flat(json.loads(file.read_text(encoding="utf-8")))
    except ValueError as error:
        raise UserError(f"{file}: not JSON ({error}); expected the config that `emu-jax train` wrote") from error
    new = _flat(json.loads(to_json(config)))
    for name in sorted(old.keys() | new.keys()):
        observing = any(name == field or name.startswith(field + ".") for field in (*OBSERVING, *free))
        if old.get(name) != new.get(name) and not observing:
            raise UserError(
                f"--workdir {workdir}: it belongs to another config: {name} is {old.get(name)!r} there and "
                f"{new.get(name)!r} here; use a new work directory"
                + (", or --reshard-data to go on near its place in the data" if name in RESHARDING else "")
            )


def check_writable(workdir: Path) -> None:
    """Raises where nothing can be written in the work directory, or it cannot be made; leaves nothing there."""
    for folder in (workdir, workdir / FOLDER):
        while not folder.exists():
            folder = folder.parent
        try:  # asks the file system itself: permissions do not tell all, least of all to root
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise UserError(
                f"--workdir {workdir}: nothing can be written in {folder} ({error.strerror}); name a folder where you "
                "may write"
            ) from error


def write_config(workdir: Path, config: ConfigDict) -> None:
    """Makes the work directory this experiment's."""
    file = workdir / CONFIG_FILE
    partial = file.with_suffix(".partial")
    partial.write_text(to_json(config) + "\n", encoding="utf-8")
    partial.replace(file)


def _flat(tree: dict, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def measure_steps(compiled: Step, state: TrainState, batch: Batch, seconds: float, began: float) -> int:
    """How many steps fill `seconds` since `began` (a time.time()): times real steps on a copy of the state."""
    copy = jax.tree.map(jnp.copy, dataclasses.replace(state, total_steps=state.total_steps + MEASURED_STEPS))
    times = []
    for _ in range(MEASURED_STEPS):
        started = time.monotonic()
        copy, metrics = compiled(copy, batch)
        jax.block_until_ready(metrics)
        times.append(time.monotonic() - started)
    left = seconds - (time.time() - began)
    # The mean of the later half: what the steps really take on a shared machine, without the first ones' page faults.
    return max(MEASURED_STEPS, int(left / np.mean(times[MEASURED_STEPS // 2 :])))
