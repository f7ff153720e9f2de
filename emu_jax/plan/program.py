"""The cost of a compiled step per device: the compiler's counts, and what only the program's text shows.

In: an executable and its optimised program (HLO). Out: a `Cost`, which can be added and subtracted: the compiler counts
the body of a loop once, so that a layer's cost is the difference of two programs.

Experimental: collectives and attention kernels are read from the HLO text by regular expressions. The text's format is
the compiler's own and may change with any release, and no real pod has confirmed the figures yet.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

COLLECTIVE = re.compile(
    r"= (?P<result>.*?)\s(?P<kind>all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)
# Notations for groups of devices: {{0,1},{2,3}}; [groups,size]<=[4,2]T(1,0); mesh['a'=4,'b'=2] {'a'}.
LISTED = re.compile(r"(?:replica_groups|source_target_pairs)=\{\{(?P<first>[\d,]+)\}")
COUNTED = re.compile(
    r"replica_groups=\[(?P<groups>\d+),(?P<size>\d+)\]<=\[(?P<sizes>[\d,]+)\](?:T\((?P<order>[\d,]+)\))?"
)
NAMED = re.compile(r"replica_groups=mesh\[(?P<sizes>[^\]]*)\] \{(?P<axes>[^}]*)\}")
CALLED = re.compile(
    r"(?P<how>body|condition|calls|to_apply|branch_computations|true_computation|false_computation)="
    r"(?P<names>\{[^}]*\}|%?[\w.\-]+)"
)
CHANNEL = re.compile(r"channel_id=\d+")
UNCOSTED = re.compile(r'custom_call_target="(?:ConcatBitcast|ZeroCrop)"')
LOOP = re.compile(r" while\(.*condition=%?(?P<condition>[\w.\-]+)")
LIMIT = re.compile(r"= s32\[\]\S* constant\((?P<count>\d+)\)")
ARRAY = re.compile(r"(?P<dtype>pred|s8|u8|bf16|f16|s32|u32|f32|f64)\[(?P<shape>[\d,]*)\]")
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "f64": 8}
# Splash attention's kernels, which the compiler cannot count, and how many products of size [queries, keys] each has:
# scores and weighted values in the forward pass; scores again and four gradients in the backward pass.
KERNEL = re.compile(r"%splash_mha_(?P<phase>fwd|dkv|dq)(?P<name>\S*) = \((?P<results>.*?)\) custom-call\(")
PRODUCTS = {"fwd": 2, "dkv": 5, "dq": 3}


@dataclasses.dataclass(frozen=True)
class Cost:
    """Cost of a step per device.

    Attributes:
      flops, traffic, seconds: the compiler's counts of operations and of bytes of HBM, and its sum of rooflines, all
        without attention kernels. If the compiler gives no time, seconds are NaN or fewer than the operations take.
      kernel_flops: FLOPs of attention kernels, without blocks above the diagonal.
      collectives: bytes sent, by "axes kind", e.g. "fsdp all-gather" or "data+fsdp all-reduce".
    """

    flops: float = 0.0
    traffic: float = 0.0
    seconds: float = 0.0
    kernel_flops: float = 0.0
    collectives: dict[str, float] = dataclasses.field(default_factory=dict)

    def __add__(self, other: Cost) -> Cost:
        return self._plus(other, 1.0)

    def __sub__(self, other: Cost) -> Cost:
        return self._plus(other, -1.0)

    def __mul__(self, factor: float) -> Cost:
        return Cost()._plus(self, factor)

    def _plus(self, other: Cost, factor: float) -> Cost:
        kinds = self.collectives | other.collectives
        return Cost(
            self.flops + factor * other.flops,
            self.traffic + factor * other.traffic,
            self.seconds + factor * other.seconds,
            self.kernel_flops + factor * other.kernel_flops,
            {kind: self.collectives.get(kind, 0.0) + factor * other.collectives.get(kind, 0.0) for kind in kinds},
        )


def cost(executable: jax.stages.Compiled, program: str, mesh: Mesh) -> Cost:
    """The cost of an executable, given its program's text."""
    found: Any = executable.cost_analysis()
    seconds = found.get("optimal_seconds", math.nan)
    if seconds < 0:
        # libtpu subtracts a second for every call that it cannot cost: on v5e, changes of layout that take no time.
        seconds += len(UNCOSTED.findall(program))
    return Cost(
        flops=found.get("flops", 0.0),
        traffic=found.get("bytes accessed", 0.0),
        seconds=seconds,
        kernel_flops=kernel_flops(program, mesh.shape.get("context", 1)),
        collectives=collectives(program, mesh),
    )


def kernel_flops(program: str, context: int) -> float:
    """FLOPs per device of the attention kernels in a program's text, with queries split over `context` devices.

    Attention with segments is causal here: blocks above the diagonal are not computed.
    """
    total = 0.0
    for line in program.splitlines():
        match = KERNEL.search(line)
        if match is None:
            continue
        shapes = [[int(n) for n in array["shape"].split(",") if n] for array in ARRAY.finditer(match["results"])]
        *rows, block, _ = shapes[0]  # scratch memory comes first; a single row has no axis
        arrays = [shape for shape in shapes if len(shape) > len(shapes[0])]
        *_, length, head_dim = next(shape for shape in arrays if len(shape) == len(shapes[0]) + 1)
        heads = max(shape[-3] for shape in arrays)  # grouped keys and values have fewer than queries
        if match["phase"] != "dkv":  # the queries are a device's share of the row
            length *= context
        blocks = length // block
        computed = (blocks + 1) / (2 * blocks) if "segmented" in match["name"] else 1.0
        scores = math.prod(rows) * heads * length * length / context * computed
        total += 2.0 * PRODUCTS[match["phase"]] * scores * head_dim
    return total


def collectives(program: str, mesh: Mesh) -> dict[str, float]:
    """Bytes that a device sends in a compiled program, by mesh axes and kind of collective.

    The body of a loop counts as often as the loop runs; a collective that is split into pieces, to overlap with other
    work, counts once. A ring of n devices passes (n - 1) / n of a gathered or scattered array through every device,
    twice for an all-reduce. An all-reduce of which every device keeps only its own part counts as a reduce-scatter.
    """
    found: dict[str, tuple[str, float]] = {}
    times = _executions(program)
    for number, (computation, line) in enumerate(_instructions(program)):
        match = COLLECTIVE.search(line)
        if match is None:
            continue
        group = _group(line, mesh.size)
        n, kind = len(group), match["kind"]
        if n < 2:
            continue
        arrays = [
            math.prod(int(size) for size in array["shape"].split(",") if size) * BYTES[array["dtype"]]
            for array in ARRAY.finditer(match["result"])
        ]
        # One collective may move several arrays; an asynchronous start also lists its inputs.
        size = float(max(arrays, default=0) if "-start(" in match[0] else sum(arrays))
        if kind == "reduce-scatter":
            size *= n  # its result is one device's part
        if kind == "all-reduce" and "reduce-scatter" in computation:
            kind = "reduce-scatter"
        share = 1.0 if kind == "collective-permute" else (n - 1) / n
        share *= (2 if kind == "all-reduce" else 1) * times[computation]
        channel = CHANNEL.search(line)  # the pieces of one collective share it
        found[channel[0] if channel else f"line {number}"] = (f"{_axes(group, mesh)} {kind}", share * size)
    moved: dict[str, float] = {}
    for name, sent in found.values():
        moved[name] = moved.get(name, 0.0) + sent
    return moved


def _instructions(program: str) -> Iterator[tuple[str, str]]:
    """Every line of a program after its header, with the name of its computation."""
    computation = ""
    for line in program.splitlines():
        if line.endswith("{") and not line.startswith(" "):
            computation = line.removeprefix("ENTRY ").split(" ")[0].removeprefix("%")
        elif computation:
            yield computation, line


def _executions(program: str) -> dict[str, float]:
    """How often each computation runs; a branch counts as often as its conditional.

    Loops are those of `scan`: a counter from 0 to the constant in the condition.
    """
    callers: dict[str, list[tuple[str, float]]] = {}
    limits: dict[str, float] = {}
    lines = [*_instructions(program)]
    for computation, line in lines:
        if match := LIMIT.search(line):
            limits[computation] = float(match["count"])
    for computation, line in lines:
        loop = LOOP.search(line)
        for match in CALLED.finditer(line):
            count = limits.get(loop["condition"], 1.0) if loop and match["how"] == "body" else 1.0
            for name in re.findall(r"[\w.\-]+", match["names"]):
                callers.setdefault(name, []).append((computation, count))

    @functools.cache
    def times(computation: str) -> float:
        if computation not in callers:
            return 1.0  # the entry
        return sum(count * times(caller) for caller, count in callers[computation])

    return {computation: times(computation) for computation in dict(lines)}


def _group(line: str, devices: int) -> list[int]:
    """The first group of devices of a collective, as positions in the mesh."""
    if match := LISTED.search(line):
        return [int(n) for n in match["first"].split(",")]
    if match := COUNTED.search(line):
        sizes = [int(n) for n in match["sizes"].split(",")]
        order = [int(n) for n in match["order"].split(",")] if match["order"] else range(len(sizes))
        grid = np.arange(math.prod(sizes)).reshape(sizes).transpose(order)
        return grid.reshape(int(match["groups"]), -1)[0].tolist()
    if match := NAMED.search(line):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", match["sizes"])}
        varying = re.findall(r"'(\w+)'", match["axes"])
        grid = np.arange(math.prod(sizes.values())).reshape([*sizes.values()])
        return grid[tuple(np.s_[:] if name in varying else 0 for name in sizes)].ravel().tolist()
    return [*range(devices)]


def _axes(group: list[int], mesh: Mesh) -> str:
    """The mesh axes along which a group's devices differ, e.g. "fsdp" or "data+fsdp"."""
    indices = np.stack(np.unravel_index(group, [*mesh.shape.values()]))  # [axes, devices of the group]
    return "+".join(axis for axis, index in zip(mesh.shape, indices, strict=True) if len(set(index)) > 1)
