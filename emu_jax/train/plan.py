"""What a training step will take on a slice that is not rented yet: memory, FLOPs, time; from the TPU compiler alone.

In: a pretraining config and a topology (`topology.py`). Out: a `Plan`. Two kinds of compilation go into it:

    memory   the real step, scanned over depth as it will run
    cost     small unrolled steps with one layer a part, and with a second layer in one of them: the compiler counts
             the body of a loop once, so a layer's cost is the difference, and the step's cost is
             first + sum over parts of (layers - 1) * (second - first)

The compiler's time is a sum of rooflines, operation by operation: no time for the interconnect, none lost to waiting.
The time of collectives, read off the compiled program, is added as if nothing overlapped. Both are estimates.
"""

from __future__ import annotations

import dataclasses
import math
import re
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from emu_jax.errors import UserError
from emu_jax.models import emu
from emu_jax.train.mesh import AXES, ROWS, batch_shardings, make_mesh
from emu_jax.train.objective import pretrain
from emu_jax.train.optimizer import OptimizerConfig
from emu_jax.train.state import abstract_state
from emu_jax.train.step import compile_step
from emu_jax.train.topology import Topology

PARTS = ("vision", "causal", "llama")
VOCABULARY = 32_004  # LLaMA's 32,000 and four special tokens, where the config leaves it to the tokenizer
AGREEMENT = 0.05  # counted and analytic FLOPs of a small step without remat may differ by so much
COLLECTIVE = re.compile(
    r"= (?P<result>.*?)\s(?P<kind>all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)
# Groups of devices, as the compiler writes them: {{0,1},{2,3}}; [groups,size]<=[…]; mesh['a'=4,'b'=2] {'a'}.
GROUPS = re.compile(
    r"replica_groups=(?:\{\{(?P<list>[\d,]+)\}|\[\d+,(?P<size>\d+)\]|mesh\[(?P<mesh>[^\]]*)\] \{(?P<axes>[^}]*)\})"
)
ARRAY = re.compile(r"(?P<dtype>pred|s8|u8|bf16|f16|s32|u32|f32|f64)\[(?P<shape>[\d,]*)\]")
OUT_OF_MEMORY = re.compile(r"required for HLO temporaries \(([\d.]+\w)\) exceeds available HBM \(([\d.]+\w)\)")
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "f64": 8}


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of a step, a device: FLOPs, bytes of HBM traffic, bytes moved by kind of collective, and roofline seconds.

    Seconds are not a number where the compiler gave none.
    """

    flops: float
    traffic: float
    seconds: float
    collectives: dict[str, float]

    def __add__(self, other: Cost) -> Cost:
        moved = Counter(self.collectives)
        moved.update(other.collectives)
        return Cost(self.flops + other.flops, self.traffic + other.traffic, self.seconds + other.seconds, dict(moved))

    def __mul__(self, factor: float) -> Cost:
        moved = {kind: size * factor for kind, size in self.collectives.items()}
        return Cost(self.flops * factor, self.traffic * factor, self.seconds * factor, moved)

    def __sub__(self, other: Cost) -> Cost:
        return self + other * -1.0


@dataclasses.dataclass(frozen=True)
class Plan:
    """What was found; sizes in bytes and times in seconds, a device.

    Attributes:
      memory: by kind; their sum is the peak. compile_s: of the real step.
      cost: of the whole step; by_part: of all layers of a part, and `rest`.
      model_flops: analytic, of the whole step over all devices, without what remat repeats.
      agreement: counted over analytic FLOPs of a small step without remat.
      interconnect_s: of all collectives one after the other.
    """

    topology: str
    chips: int
    mesh: dict[str, int]
    rows: int
    remat: str
    memory: dict[str, float]
    capacity: float
    compile_s: float
    cost: Cost
    by_part: dict[str, Cost]
    model_flops: float
    agreement: float
    interconnect_s: float
    peak_flops: float
    tokens: int

    @property
    def fits(self) -> bool:
        return sum(self.memory.values()) <= self.capacity

    def mfu(self, seconds: float) -> float:
        """Model FLOPs over what the chips could do in that time."""
        return self.model_flops / (seconds * self.chips * self.peak_flops)


def make_plan(config: ConfigDict, topology: Topology, rows_per_device: int = 0) -> Plan:
    """Compiles a pretraining config's step for a topology.

    Args:
      rows_per_device: instead of `config.data.batch_rows`.

    Raises:
      UserError: the config is of another objective, its mesh or rows do not divide, or the step does not fit.
    """
    if config.get("objective") != "pretrain":
        raise UserError(f"config.objective={config.get('objective')!r}; only pretraining can be planned")
    config = config.copy_and_resolve_references()
    config.model.llama.vocab_size = config.model.llama.vocab_size or VOCABULARY
    mesh = make_mesh(config.train.mesh, topology.devices)
    if rows_per_device:
        config.data.batch_rows = rows_per_device * math.prod(mesh.shape[axis] for axis in ROWS)
    model = emu.EmuConfig.from_dict(config.model)
    rows, length, pictures = config.data.batch_rows, config.data.row_tokens, config.data.row_images

    started = time.monotonic()
    try:
        step, _ = _compile(config, mesh)
    except jax.errors.JaxRuntimeError as error:
        found = OUT_OF_MEMORY.search(str(error))
        if found is None:
            raise
        raise UserError(
            f"{rows:,} rows with remat {model.remat} do not fit {topology.name}: the compiler needs {found[1]} "
            f"beside the parameters, of {found[2]} in all; fewer rows, config.model.remat=full, or more chips"
        ) from error
    compile_s = time.monotonic() - started

    depths = dict.fromkeys(PARTS, 1)
    first = _cost(_compile(config, mesh, depths, unroll=True), mesh)
    layers = {part: _cost(_compile(config, mesh, depths | {part: 2}, unroll=True), mesh) - first for part in PARTS}
    by_part = {part: layers[part] * getattr(model, part).layers for part in PARTS}
    by_part["rest"] = first - layers["vision"] - layers["causal"] - layers["llama"]
    total = sum(by_part.values(), Cost(0.0, 0.0, 0.0, {}))

    chip, per_device = topology.chip, topology.chips_per_device
    if total.seconds < total.flops / (chip.flops * per_device):  # no roofline can be: seconds are missing
        total = dataclasses.replace(total, seconds=math.nan)

    plain = _cost(_compile(config, mesh, depths, unroll=True, remat="none"), mesh)
    small = _with_depths(config, depths)
    expected = 3.0 * sum(
        emu.forward_flops(emu.EmuConfig.from_dict(small.model), rows * pictures, rows, length).values()
    )
    agreement = plain.flops * len(topology.devices) / expected

    return Plan(
        topology=topology.name,
        chips=topology.chips,
        mesh={axis: mesh.shape[axis] for axis in AXES},
        rows=rows,
        remat=model.remat,
        memory=_memory(step, config, mesh),
        capacity=chip.hbm * per_device,
        compile_s=compile_s,
        cost=total,
        by_part=by_part,
        model_flops=3.0 * sum(emu.forward_flops(model, rows * pictures, rows, length).values()),
        agreement=agreement,
        interconnect_s=sum(total.collectives.values()) / (chip.interconnect * per_device / 2),
        peak_flops=chip.flops,
        tokens=rows * length,
    )


def _with_depths(config: ConfigDict, depths: dict[str, int]) -> ConfigDict:
    config = config.copy_and_resolve_references()
    for part, layers in depths.items():
        config.model[part].layers = layers
    return config


def _compile(
    config: ConfigDict,
    mesh: Mesh,
    depths: dict[str, int] | None = None,
    *,
    unroll: bool | None = None,
    remat: str | None = None,
) -> tuple[Any, str]:
    """The step's executable and its optimised program: as the config has it, or of other depths."""
    config = _with_depths(config, depths or {})
    if unroll is not None:
        config.model.unroll = unroll
        config.model.loss_chunk = config.data.row_tokens  # one chunk: a loop's body is counted once
    if remat is not None:
        config.model.remat = remat
    model = emu.EmuConfig.from_dict(config.model)
    objective = pretrain(model, emu.SpecialIds(pad=0, img=1, img_end=2, image=3))
    optimizer = OptimizerConfig.from_dict(config.optimizer)
    state = abstract_state(objective, optimizer, mesh)
    batch = _abstract_batch(config, model, mesh)
    with jax.set_mesh(mesh), tempfile.TemporaryDirectory() as folder:
        # The executable's own text is refused for large programs; the compiler's dump is not.
        options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        step = compile_step(objective, optimizer, config.train.seed, state, batch, options)
        (program,) = Path(folder).glob("*.after_optimizations.txt")
        return step, program.read_text(encoding="utf-8")


def _abstract_batch(config: ConfigDict, model: emu.EmuConfig, mesh: Mesh) -> emu.Batch:
    rows, length = config.data.batch_rows, config.data.row_tokens
    size = model.vision.image_size
    shapes = {name: ((rows, length), jnp.int32) for name in ("tokens", "segments", "slots")}
    shapes |= {name: ((rows, length), jnp.float32) for name in ("text_weights", "visual_weights")}
    shapes["images"] = ((rows, config.data.row_images, size, size, 3), jnp.uint8)
    arrays = {name: jax.ShapeDtypeStruct(*shape) for name, shape in shapes.items()}
    places = batch_shardings(mesh, arrays)
    placed = {n: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=places[n]) for n, x in arrays.items()}
    return emu.Batch(**placed)


def _memory(step: Any, config: ConfigDict, mesh: Mesh) -> dict[str, float]:
    """Bytes of a device by kind; temporary memory holds gradients and activations, which share their places."""
    model = emu.EmuConfig.from_dict(config.model)
    objective = pretrain(model, emu.SpecialIds(pad=0, img=1, img_end=2, image=3))
    state = abstract_state(objective, OptimizerConfig.from_dict(config.optimizer), mesh)

    def size(tree: Any) -> float:
        leaves = jax.tree.leaves(tree)
        return float(sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves))

    found = step.memory_analysis()
    known = {"parameters": size(state.params), "optimizer": size(state.opt_state)}
    held = found.argument_size_in_bytes - sum(known.values())
    return known | {
        "batch and statistics": float(held),
        "gradients and activations": float(found.temp_size_in_bytes),
        "results": float(found.output_size_in_bytes - found.alias_size_in_bytes),
    }


def _cost(compiled: tuple[Any, str], mesh: Mesh) -> Cost:
    step, program = compiled
    found = step.cost_analysis()
    seconds = found.get("optimal_seconds", 0.0)
    if seconds <= 0:  # libtpu subtracts a whole second for every call that it cannot cost (v5e)
        seconds = math.nan
    return Cost(found["flops"], found["bytes accessed"], seconds, collectives(program, mesh.size))


def collectives(program: str, devices: int) -> dict[str, float]:
    """Bytes that a device sends, by kind of collective, of a compiled program's text.

    A ring of n passes (n - 1) / n of a gathered or scattered array through every device, twice for a sum. A sum of
    which every device keeps its own part is a reduce-scatter, however it is written.
    """
    moved: Counter[str] = Counter()
    computation = ""
    for line in program.splitlines():
        if line.endswith("{") and not line.startswith(" "):
            computation = line.split(" ")[0]
        match = COLLECTIVE.search(line)
        if match is None:
            continue
        arrays = [
            math.prod(int(n) for n in found["shape"].split(",") if n) * BYTES[found["dtype"]]
            for found in ARRAY.finditer(match["result"])
        ]
        size, n, kind = float(max(arrays, default=0)), _group_size(line, devices), match["kind"]
        if kind == "reduce-scatter":
            size *= n  # its result is a device's part
        if kind == "all-reduce" and "reduce-scatter" in computation:
            kind = "reduce-scatter"
        if n > 1:
            share = 1.0 if kind == "collective-permute" else (n - 1) / n
            moved[kind] += (2 if kind == "all-reduce" else 1) * share * size
    return dict(moved)


def _group_size(line: str, devices: int) -> int:
    match = GROUPS.search(line)
    if match is None:
        return devices
    if match["list"]:
        return match["list"].count(",") + 1
    if match["size"]:
        return int(match["size"])
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", match["mesh"]))
    return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", match["axes"]))


def describe(plan: Plan) -> str:
    """The plan as a page of text."""
    gib = float(1 << 30)
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items() if size > 1) or "one device"
    need = sum(plan.memory.values())
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    exposed = plan.cost.seconds + plan.interconnect_s
    lines = [
        f"{plan.topology}: {plan.chips} chips, mesh {mesh}, {plan.rows:,} rows a step, remat {plan.remat}",
        "",
        f"memory: {need / gib:.2f} of {plan.capacity / gib:.0f} GiB a device: {verdict}",
        *(f"  {kind:28s}{size / gib:8.2f} GiB" for kind, size in plan.memory.items()),
        "",
        "roofline by part, as the compiler estimates it (a device)",
        f"  {'':12s}{'s':>9s}{'TFLOP':>9s}{'GB of HBM':>11s}",
        *(
            f"  {part:12s}{cost.seconds:9.3f}{cost.flops / 1e12:9.1f}{cost.traffic / 1e9:11.1f}"
            for part, cost in plan.by_part.items()
        ),
        "collectives, GB sent a device: "
        + (", ".join(f"{kind} {size / 1e9:.1f}" for kind, size in sorted(plan.cost.collectives.items())) or "none"),
        "",
        f"counted FLOPs are {plan.agreement:.3f} of the model's (a small step without remat)",
    ]
    if abs(plan.agreement - 1) > AGREEMENT:
        return "\n".join([*lines, f"no MFU: they should agree within {AGREEMENT:.0%}"])
    if math.isnan(plan.cost.seconds):
        return "\n".join([*lines, "no time: the compiler could not cost every operation of the step on this chip"])
    lines.append("estimates:")
    for name, seconds in {"roofline": plan.cost.seconds, "interconnect fully exposed": exposed}.items():
        rate = plan.tokens / seconds / plan.chips
        lines.append(f"  {name:28s}{seconds:8.3f} s a step{rate:10,.0f} tokens/s/chip{plan.mfu(seconds):8.1%} MFU")
    return "\n".join([*lines, f"the step compiled in {plan.compile_s:.0f} s"])
