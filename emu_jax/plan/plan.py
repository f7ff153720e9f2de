"""What a step will take on devices that are not rented yet: memory, FLOPs, time; from the compiler alone.

In: a config and a topology (`topology.py`). Out: a `Plan`. Two kinds of compilation go into it:

    memory   the real step, scanned over depth as it will run
    cost     small steps, written out with one layer a part, and with a second layer in one of them: the compiler
             counts the body of a loop once, so a layer's cost is the difference, and the step's cost is
             first + sum over parts of (layers - 1) * (second - first)

The compiler's time is a sum of rooflines, operation by operation: no time for attention kernels or the interconnect,
none lost to waiting. Both are added as if nothing overlapped. All times are estimates.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from emu_jax.config import override
from emu_jax.errors import UserError
from emu_jax.plan.program import Cost
from emu_jax.plan.steps import Step, decode, scanned, shallow, step_kind
from emu_jax.plan.topology import Chip, Topology
from emu_jax.sharding import AXES, make_mesh

AGREEMENT = 0.05  # counted and analytic FLOPs of a small step without remat may differ by so much
FEW_ROWS = 8  # a device, of a step that is compiled for its FLOPs alone
# Of a chip's peak, that attention kernels reach on the blocks they compute: an assumption, not measured here.
KERNEL_EFFICIENCY = 0.4
OUT_OF_MEMORY = re.compile(r"required for HLO temporaries \(([\d.]+\w)\) exceeds available HBM \(([\d.]+\w)\)")
USED = re.compile(r"Used ([\d.]+\w) of ([\d.]+\w) hbm")


@dataclasses.dataclass(frozen=True)
class Plan:
    """What was found; sizes in bytes and times in seconds, a device.

    Attributes:
      kind: of step. rows: of a batch over all devices, counted in `row_name`. tokens: of a batch.
      memory: by kind; their sum is the peak. compile_s: of the real step.
      cost: of the whole step; by_part: of all layers of a part, and `rest`.
      model_flops: analytic, by part, of the whole step over all devices, without what remat repeats.
      agreement: counted over analytic FLOPs of a small step without remat, attention kernels left out of both; not a
        number for decoding, which waits for memory.
      times: of a step: roofline; with attention kernels; with the interconnect fully exposed too.
      interconnect_s: of all collectives one after the other. peak_flops: of a chip. bandwidth: of a device's HBM.
    """

    kind: str
    topology: str
    chips: int
    mesh: dict[str, int]
    rows: int
    row_name: str
    tokens: int
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
        """Bytes of a device."""
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return self.peak <= self.capacity

    @property
    def trusted(self) -> bool:
        """Whether the counted FLOPs are the model's."""
        return abs(self.agreement - 1) <= AGREEMENT

    def mfu(self, seconds: float) -> float:
        """Model FLOPs over what the chips could do in that time."""
        return sum(self.model_flops.values()) / (seconds * self.chips * self.peak_flops)


def make_plan(
    config: ConfigDict, topology: Topology, rows_per_device: int = 0, decode_rows: int = 0, timed: bool = True
) -> Plan:
    """Compiles a config's training step, or decoding with its model, for a topology.

    Args:
      rows_per_device: instead of the config's batch. decode_rows: plan the decoding of so many sequences instead.
      timed: compile the small steps too; else costs, times and agreement are not numbers, and only memory and
        collectives are found, in one compilation.

    Raises:
      UserError: the config cannot be planned, its mesh or rows do not divide, or the step does not fit.
    """
    kind = decode if decode_rows else step_kind(config)
    mesh = make_mesh(config.train.mesh, topology.devices)

    def make(config: ConfigDict) -> Step:
        return kind(config, mesh, decode_rows or rows_per_device)

    step = make(config)
    started = time.monotonic()
    try:
        executable, whole = step.build()
    except jax.errors.JaxRuntimeError as error:
        raise _refusal(error, step, topology) from error
    compile_s = time.monotonic() - started

    total, by_part, agreement = Cost(math.nan, math.nan, math.nan, math.nan), {}, math.nan
    if timed and decode_rows:
        # A loop of one layer after the other, and one of two at a time: the difference is a layer.
        layer = decode(config, mesh, decode_rows, unroll=2).build()[1] - whole
        by_part = {"llama": layer * config.model.llama.layers, "rest": whole - layer}
        total = sum(by_part.values(), Cost())
    elif timed:
        parts = scanned(kind, config)
        plain = None if parts or _remat(config, kind) != "none" else whole
        # A step that cannot be made shallow fits without remat for few rows alone, and the ratio needs no more.
        few = make if parts or plain else lambda config: kind(config, mesh, FEW_ROWS)
        agreement = _agreement(few, config, kind, mesh, plain)
        total, by_part = _by_layers(make, config, parts) if parts else (whole, {"all": whole})
    total = dataclasses.replace(total, collectives=whole.collectives)  # of the program that will run
    chip = topology.chip
    if total.seconds < total.flops / chip.flops:  # no roofline can be: seconds are missing
        total = dataclasses.replace(total, seconds=math.nan)

    kernel_s = total.kernel_flops / (chip.flops * KERNEL_EFFICIENCY)
    interconnect_s = sum(size / _speed(chip, names) for names, size in total.collectives.items())
    times = {"roofline": total.seconds, "with attention kernels": total.seconds + kernel_s}
    times["interconnect fully exposed"] = total.seconds + kernel_s + interconnect_s
    return Plan(
        kind=kind.__name__,
        topology=topology.name,
        chips=topology.chips,
        mesh={axis: mesh.shape[axis] for axis in AXES},
        rows=step.rows,
        row_name=step.row_name,
        tokens=step.tokens,
        remat=_remat(config, kind),
        memory=_memory(executable, step),
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


def _by_layers(
    make: Callable[[ConfigDict], Step], config: ConfigDict, parts: tuple[str, ...]
) -> tuple[Cost, dict[str, Cost]]:
    """The cost of the whole step from that of small ones, and its parts."""
    depths = dict.fromkeys(parts, 1)

    def small(depths: dict[str, int]) -> Cost:
        return make(shallow(config, depths)).build()[1]

    first = small(depths)
    layers = {part: small(depths | {part: 2}) - first for part in parts}
    by_part = {part: layer * config.model[part].layers for part, layer in layers.items()}
    by_part["rest"] = first - sum(layers.values(), Cost())
    return sum(by_part.values(), Cost()), by_part


def _agreement(
    make: Callable[[ConfigDict], Step], config: ConfigDict, kind: Callable, mesh: Mesh, found: Cost | None
) -> float:
    """Counted over analytic FLOPs of a small step that computes nothing twice; `found`, where that is the whole one."""
    small = shallow(config, dict.fromkeys(scanned(kind, config), 1))
    (small.unet if kind.__name__ == "decoder" else small.model).remat = "none"
    step = make(small)
    found = found or step.build()[1]
    expected = sum(step.flops.values()) - (step.attention_flops if found.kernel_flops else 0.0)
    return found.flops * mesh.size / expected


def _remat(config: ConfigDict, kind: Callable) -> str:
    return {"decode": "none"}.get(kind.__name__) or (config.unet if "unet" in config else config.model).remat


def _refusal(error: Exception, step: Step, topology: Topology) -> Exception:
    """A step that does not fit, in one line; any other error as it is."""
    found = OUT_OF_MEMORY.search(str(error)) or USED.search(str(error))
    if found is None:
        return error
    return UserError(
        f"{step.rows:,} {step.row_name} do not fit {topology.name}: the compiler needs {found[1]} of {found[2]}; fewer "
        "rows, more of config.model.remat (full keeps least), or more chips"
    )


def _memory(executable: jax.stages.Compiled, step: Step) -> dict[str, float]:
    """Bytes of a device by kind. Gradients stand at the end where activations stood before: both are temporary."""
    found = executable.memory_analysis()
    assert found is not None  # compilers for CPUs and TPUs tell it
    held = sum(step.held.values())
    gradients = min(step.moving, found.temp_size_in_bytes)
    kinds = dict(step.held)
    kinds |= {"gradients": gradients} if gradients else {}
    kinds["activations and workspace"] = found.temp_size_in_bytes - gradients
    # What the compiler adds by padding arrays, and results that are not written over arguments.
    results = found.output_size_in_bytes - found.alias_size_in_bytes
    kinds["padding and results"] = max(found.argument_size_in_bytes - held, 0.0) + results
    return kinds


def _speed(chip: Chip, names: str) -> float:
    """Bytes a second that a device sends along mesh axes: over the data-centre network where slices take part."""
    return chip.network if "slice" in names.split(" ")[0].split("+") else chip.interconnect


ROWS_SWEPT = "rows"  # the name under which --compare sweeps rows a device


def compare(
    config: ConfigDict,
    topology: Topology,
    sweep: Mapping[str, Sequence[str]],
    rows_per_device: int = 0,
    decode_rows: int = 0,
    timed: bool = True,
) -> list[tuple[dict[str, str], Plan | UserError]]:
    """Plans every combination of values, the fastest first, untimed ones by memory; what cannot be planned last.

    Args:
      sweep: field of the config (such as model.remat or train.mesh.data), or `rows` a device, -> its values.

    Raises:
      UserError: no such field.
    """
    variants = []
    for values in itertools.product(*sweep.values()):
        choice, variant, rows = dict(zip(sweep, values, strict=True)), config.copy_and_resolve_references(), 0
        for field, value in choice.items():
            if field == ROWS_SWEPT:
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
    """What sorts plans: whether it fits, seconds a row, memory."""
    if isinstance(plan, UserError):
        return True, math.inf, math.inf
    seconds = plan.times["interconnect fully exposed"] / plan.rows
    return not plan.fits, math.inf if math.isnan(seconds) else seconds, plan.peak
