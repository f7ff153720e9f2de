"""Memory, FLOPs and time of a step on devices that you do not have yet, from the compiler alone.

In: a config and a topology (`topology.py`). Out: a `Plan`. It takes two kinds of compilation:

    memory   the real step, scanned over depth as it will run
    cost     small unrolled steps: one with one layer in every part, and for each part one with a second layer there.
             The compiler counts the body of a loop once, so a layer's cost is the difference, and the step's cost is
             first + sum over parts of (layers - 1) * (second - first)

The compiler's time is a sum of rooflines, one per operation, without attention kernels, interconnect and waiting. The
time of kernels and interconnect is added as if nothing overlapped. All times are estimates.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
import time
from collections.abc import Mapping, Sequence

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from emu_jax.chips import Chip
from emu_jax.config import override
from emu_jax.errors import UserError
from emu_jax.plan.program import Cost
from emu_jax.plan.steps import PlannedStep, decode, planned_task, training_step
from emu_jax.plan.topology import Topology
from emu_jax.sharding import AXES, make_mesh
from emu_jax.train.fit import fit
from emu_jax.train.global_batch import row_parts
from emu_jax.train.tasks.task import Task

AGREEMENT = 0.05  # tolerated difference between counted and analytic FLOPs of a small step without remat
IMAGE_PARTS = ("vision", "causal")  # what computes images; the rest computes positions of rows
FEW_ROWS = 8  # rows per device of a step that is compiled only to count its FLOPs
# Share of a chip's peak that attention kernels reach on the blocks they compute: an assumption, not measured here.
KERNEL_EFFICIENCY = 0.4
DECODE = "decode"  # the kind of a plan that decodes; other kinds are objectives
OUT_OF_MEMORY = re.compile(r"required for HLO temporaries \(([\d.]+\w)\) exceeds available HBM \(([\d.]+\w)\)")
USED = re.compile(r"Used ([\d.]+\w) of ([\d.]+\w) hbm")


class DoesNotFit(UserError):
    """The compiler needs more memory than a device has."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """The planned step; sizes in bytes and times in seconds, per device.

    Attributes:
      kind: the config's objective, or `DECODE`.
      rows, row_name, tokens: a batch over all devices, as in `PlannedStep`.
      micro_batches: how many it is cut into.
      steps: length of the run; 0 if it is set in minutes.
      memory: bytes by kind while that program of the step runs that needs most; their sum is the peak.
      capacity: HBM of a device.
      compile_s: compilation time of the real step.
      cost: cost of the whole step.
      by_part: cost of all layers of each part, and of the `rest`.
      model_flops: analytic FLOPs by part of the whole step over all devices, without recomputation by remat.
      agreement: counted over analytic FLOPs of a small step without remat, attention kernels left out of both; NaN for
        decoding, whose time is memory traffic.
      times: seconds of a step by roofline, with attention kernels, and with the interconnect fully exposed too.
      interconnect_s: time of all collectives, one after the other.
      peak_flops: FLOP/s of a device.
      bandwidth: bytes/s of a device's HBM.
    """

    kind: str
    topology: str
    chips: int
    mesh: dict[str, int]
    rows: int
    row_name: str
    tokens: int
    micro_batches: int
    steps: int
    remat: str
    memory: dict[str, float]
    capacity: float
    compile_s: float
    cost: Cost
    by_part: dict[str, Cost]
    model_flops: dict[str, float]
    agreement: float
    times: dict[str, float]
    interconnect_s: float
    peak_flops: float
    bandwidth: float

    @property
    def peak(self) -> float:
        """Bytes of HBM that a device needs."""
        return sum(self.memory.values())

    @property
    def devices(self) -> int:
        return math.prod(self.mesh.values())

    @property
    def fits(self) -> bool:
        return self.peak <= self.capacity

    @property
    def trusted(self) -> bool:
        """Whether the counted FLOPs agree with the model's."""
        return abs(self.agreement - 1) <= AGREEMENT

    def mfu(self, seconds: float, fill: Mapping[str, float] | None = None) -> float:
        """Model FLOPs utilisation of a step that takes so long.

        Args:
          fill: share of `tokens`, and of image slots (`images`), that are not padding; all are by default.
        """
        fill = fill or {}
        shares = {part: fill.get("images" if part in IMAGE_PARTS else "tokens", 1.0) for part in self.model_flops}
        useful = sum(shares[part] * count for part, count in self.model_flops.items())
        return useful / (seconds * self.devices * self.peak_flops)


def make_plan(
    config: ConfigDict, topology: Topology, rows_per_device: int = 0, decode_rows: int = 0, timed: bool = True
) -> Plan:
    """Compiles a config's training step, or decoding with its model, for a topology.

    Args:
      rows_per_device: rows of a batch per data-parallel device, in place of the config's batch.
      decode_rows: plan decoding of so many sequences instead of training.
      timed: compile the small steps too; without them only memory and collectives are known, after one compilation, and
        costs, times and agreement are NaN.

    Raises:
      UserError: the config cannot be planned, its mesh or rows do not divide, or the step does not fit.
    """
    config = fit(config, topology.devices, rows_per_device or decode_rows)
    mesh = make_mesh(config.train.mesh, topology.devices)
    task = None if decode_rows else planned_task(config, rows_per_device * row_parts(mesh))
    step = decode(config, mesh, decode_rows) if task is None else training_step(task, mesh)
    started = time.monotonic()
    try:
        executables, whole = step.build()
    except jax.errors.JaxRuntimeError as error:
        raise _does_not_fit(error, step, topology) from error
    compile_s = time.monotonic() - started

    total, by_part, agreement = Cost(math.nan, math.nan, math.nan, math.nan), {}, math.nan
    if timed and task is None:
        # One loop computes a layer per iteration, the other one two: the difference is a layer.
        layer = decode(config, mesh, decode_rows, unroll=2).build()[1] - whole
        by_part = {"llama": layer * config.model.llama.layers, "rest": whole - layer}
        total = sum(by_part.values(), Cost())
    elif timed and task is not None:
        plain = None if task.scanned or task.remat != "none" else whole
        # A step without scanned parts cannot be made shallow. Without remat it fits for few rows, enough for the ratio.
        few = task if task.scanned or plain else planned_task(config, FEW_ROWS * row_parts(mesh))
        agreement = _agreement(few, mesh, plain)
        total, by_part = _by_layers(task, mesh) if task.scanned else (whole, {"all": whole})
    total = dataclasses.replace(total, collectives=whole.collectives)  # those of the program that will run
    chip = topology.chip
    if total.seconds < total.flops / chip.flops:  # less than any roofline: seconds are missing
        total = dataclasses.replace(total, seconds=math.nan)

    kernel_s = total.kernel_flops / (chip.flops * KERNEL_EFFICIENCY)
    interconnect_s = sum(size / _speed(chip, names) for names, size in total.collectives.items())
    times = {"roofline": total.seconds, "with attention kernels": total.seconds + kernel_s}
    times["interconnect fully exposed"] = total.seconds + kernel_s + interconnect_s
    return Plan(
        kind=DECODE if task is None else str(config.objective),
        topology=topology.name,
        chips=topology.chips,
        mesh={axis: mesh.shape[axis] for axis in AXES},
        rows=step.rows,
        row_name=step.row_name,
        tokens=step.tokens,
        micro_batches=1 if task is None else config.optimizer.accumulate_steps,
        steps=0 if task is None else config.train.steps,
        remat="none" if task is None else task.remat,
        memory=max((_memory(executable, step) for executable in executables), key=lambda kinds: sum(kinds.values())),
        capacity=chip.hbm,
        compile_s=compile_s,
        cost=total,
        by_part=by_part,
        model_flops=step.flops,
        agreement=agreement,
        times=times,
        interconnect_s=interconnect_s,
        peak_flops=chip.flops,
        bandwidth=chip.bandwidth,
    )


def _by_layers(task: Task, mesh: Mesh) -> tuple[Cost, dict[str, Cost]]:
    """The cost of the whole step and of its parts, from small steps; a part of one layer counts as rest."""
    depths = dict.fromkeys(task.scanned, 1)
    deep = [part for part, layers in task.scanned.items() if layers > 1]

    def small(depths: dict[str, int]) -> Cost:
        return training_step(task.shallow(depths), mesh).build()[1]

    first = small(depths)
    layers = {part: small(depths | {part: 2}) - first for part in deep}
    by_part = {part: layer * task.scanned[part] for part, layer in layers.items()}
    by_part["rest"] = first - sum(layers.values(), Cost())
    return sum(by_part.values(), Cost()), by_part


def _agreement(task: Task, mesh: Mesh, counted: Cost | None) -> float:
    """Counted over analytic FLOPs of a small step that recomputes nothing.

    Args:
      counted: the cost of that step, where it is known.
    """
    step = training_step(task.shallow(dict.fromkeys(task.scanned, 1), remat="none"), mesh)
    counted = counted or step.build()[1]
    expected = sum(step.flops.values()) - (step.attention_flops if counted.kernel_flops else 0.0)
    return counted.flops * mesh.size / expected


def _does_not_fit(error: Exception, step: PlannedStep, topology: Topology) -> Exception:
    """`DoesNotFit` for a step that does not; any other error unchanged."""
    found = OUT_OF_MEMORY.search(str(error)) or USED.search(str(error))
    if found is None:
        return error
    return DoesNotFit(
        f"{step.rows:,} {step.row_name} do not fit {topology.name}: the compiler needs {found[1]} of {found[2]}; fewer "
        "rows, more remat (full keeps least), or more chips"
    )


def _memory(executable: jax.stages.Compiled, step: PlannedStep) -> dict[str, float]:
    """Bytes per device by kind while a program of the step runs.

    Gradients are temporary too: at the end they use the memory of activations.
    """
    found = executable.memory_analysis()
    assert found is not None  # compilers for CPUs and TPUs report it
    held = sum(step.held.values())
    gradients = min(step.moving, found.temp_size_in_bytes)
    kinds = dict(step.held)
    kinds |= {"gradients": gradients} if gradients else {}
    kinds["activations and workspace"] = found.temp_size_in_bytes - gradients
    # Padding that the compiler adds, and results that do not reuse the memory of arguments.
    results = found.output_size_in_bytes - found.alias_size_in_bytes
    kinds["padding and results"] = max(found.argument_size_in_bytes - held, 0.0) + results
    return kinds


def _speed(chip: Chip, names: str) -> float:
    """Bytes/s that a device sends along mesh axes: over the data-centre network if slices are among them."""
    return chip.network if "slice" in names.split(" ")[0].split("+") else chip.interconnect


ROWS_FIELD = "rows"  # the field of a sweep that stands for rows_per_device


def compare(
    config: ConfigDict,
    topology: Topology,
    sweep: Mapping[str, Sequence[str]],
    rows_per_device: int = 0,
    decode_rows: int = 0,
    timed: bool = True,
) -> list[tuple[dict[str, str], Plan | UserError]]:
    """Plans every combination of values: the fastest first, untimed ones by memory, those that fail last.

    Args:
      sweep: fields of the config (such as model.llama.remat or train.mesh.data), or `rows` per device, -> their values.

    Raises:
      UserError: there is no such field.
    """
    variants = []
    for values in itertools.product(*sweep.values()):
        choice, variant, rows = dict(zip(sweep, values, strict=True)), config.copy_and_resolve_references(), 0
        for field, value in choice.items():
            if field == ROWS_FIELD:
                rows = int(value)
            else:
                override(variant, f"--config.{field}={value}")
        variants.append((choice, variant, rows or rows_per_device))
    found: list[tuple[dict[str, str], Plan | UserError]] = []
    for choice, variant, rows in variants:
        try:
            found.append((choice, make_plan(variant, topology, rows, decode_rows, timed)))
        except UserError as error:
            found.append((choice, error))
    return sorted(found, key=lambda pair: _rank(pair[1]))


def _rank(plan: Plan | UserError) -> tuple[bool, float, float]:
    """The sort key of a plan: whether it fits, seconds per row, memory."""
    if isinstance(plan, UserError):
        return True, math.inf, math.inf
    seconds = plan.times["interconnect fully exposed"] / plan.rows
    return not plan.fits, math.inf if math.isnan(seconds) else seconds, plan.peak
