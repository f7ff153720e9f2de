"""Searches the mesh, micro-batches and remat with which a config's step should be fastest on a slice.

In: a config and a topology. Out: the best few choices that fit, as settings to train with. Every choice has a time by
arithmetic (`Choice.seconds`): products with what remat repeats, and traffic, as if nothing overlapped. The choices are
compiled in this order, untimed, until enough of them fit. Not compiled are those whose state alone does not fit, and
those that need more memory than one that did not fit.

The arithmetic only ranks: `emu-jax plan` with a suggestion's settings gives its time by the compiler's counts.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping

import jax
from jax.sharding import AbstractMesh, AxisType
from ml_collections import ConfigDict

from emu_jax.chips import Chip
from emu_jax.errors import UserError
from emu_jax.plan.plan import DoesNotFit, Plan, make_plan
from emu_jax.plan.steps import placed, planned_task, size
from emu_jax.plan.topology import Topology
from emu_jax.sharding import AXES
from emu_jax.train.fit import PARTS

# Share of a chip's peak that products reach: about what the compiler's rooflines give the 14 B step. It decides how
# much a second of products weighs beside a second of traffic.
PRODUCT_EFFICIENCY = 0.7
# Forward and backward passes that a part costs, over the three that its FLOPs count, by its remat.
REPEATED = {"none": 1.0, "dots": 1.0, "full": 4 / 3}
KEPT = ("full", "dots", "none")  # remat, from what keeps least for the backward pass to what keeps most
SEARCHED = {"vision": ("full", "dots"), "causal": ("full",), "llama": ("full", "dots")}
MOST_ROWS = 16  # of a device at a time
ALIKE = 0.03  # times in one step of such a ratio count as equal: then what holds less is compiled first
TRIES = 12  # compilations, at most


@dataclasses.dataclass(frozen=True)
class Choice:
    """How a step is cut over devices and time.

    Attributes:
      slices, data, fsdp: sizes of the mesh's axes.
      rows: rows of a batch that a device holds at a time.
      micro_batches: how many a batch is cut into.
      remat: what is saved for the backward pass, by part.
      state: bytes of a device for parameters, Adam's moments and sums of gradients.
      seconds: a step's time by arithmetic.
    """

    slices: int
    data: int
    fsdp: int
    rows: int
    micro_batches: int
    remat: Mapping[str, str]
    state: float = 0.0
    seconds: float = 0.0

    @property
    def settings(self) -> dict[str, str | int]:
        """Fields of the config, and their values."""
        mesh = {"slice": self.slices, "data": self.data, "fsdp": self.fsdp}
        return {
            **{f"train.mesh.{axis}": size for axis, size in mesh.items()},
            "optimizer.accumulate_steps": self.micro_batches,
            **{f"model.{part}.remat": value for part, value in self.remat.items()},
        }

    def needs_no_less_than(self, other: Choice) -> bool:
        """Whether this keeps at least as much on a device, in every respect."""
        more = all(KEPT.index(self.remat[part]) >= KEPT.index(kept) for part, kept in other.remat.items())
        return more and self.rows >= other.rows and self.state >= other.state


@dataclasses.dataclass(frozen=True)
class Suggestions:
    """The best choices that fit, fastest first; how many were ranked, and how many of them were compiled."""

    found: list[tuple[Choice, Plan]]
    ranked: int
    compiled: int


def suggest(config: ConfigDict, topology: Topology, count: int = 3) -> Suggestions:
    """The `count` fastest choices that fit the topology; fewer if `TRIES` compilations find no more.

    Raises:
      UserError: the config is not Emu's, its batch is not known, or no choice divides it.
    """
    found: list[tuple[Choice, Plan]] = []
    too_large: list[Choice] = []
    compiled = 0
    ranked = choices(config, topology)
    for choice in ranked:
        if len(found) == count or compiled == TRIES:
            break
        if any(choice.needs_no_less_than(other) for other in too_large):
            continue
        compiled += 1
        try:
            plan = make_plan(applied(config, choice), topology, timed=False)
        except DoesNotFit:
            too_large.append(choice)
            continue
        if plan.fits:
            found.append((choice, plan))
        else:
            too_large.append(choice)
    return Suggestions(found, len(ranked), compiled)


def applied(config: ConfigDict, choice: Choice) -> ConfigDict:
    """A copy of the config with a choice's settings."""
    config = config.copy_and_resolve_references()
    config.train.mesh.update({"slice": choice.slices, "data": choice.data, "fsdp": choice.fsdp})
    config.optimizer.accumulate_steps = choice.micro_batches
    for part, remat in choice.remat.items():
        config.model[part].remat = remat
    return config


def choices(config: ConfigDict, topology: Topology) -> list[Choice]:
    """All choices that divide the batch and whose state fits, the fastest first; of equally fast ones, what holds less.

    Raises:
      UserError: as in `suggest`.
    """
    if not all(part in config.get("model", {}) for part in PARTS):
        raise UserError(
            f"--suggest searches for Emu's step; config.objective={config.get('objective', None)!r} has another model"
        )
    rows = config.data.batch_rows
    if not rows:
        raise UserError("--suggest needs a known batch; set --config.data.batch_rows=…, as a run's config.json has it")
    sizes = {axis: config.train.mesh.get(axis, 1) for axis in ("tensor", "context")}
    for axis, ways in sizes.items():
        if ways < 1:
            raise UserError(
                f"config.train.mesh.{axis}={ways}: --suggest searches slice, data and fsdp; set the size of {axis}"
            )
    slices = len({getattr(device, "slice_index", None) or 0 for device in topology.devices})
    ways = (
        len(topology.devices) // slices // math.prod(sizes.values())
    )  # devices of a slice that hold rows of their own
    shards = ways * slices
    step, found = _Arithmetic(config, topology.chip, len(topology.devices)), []
    for fsdp, held, remat in itertools.product(_divisors(ways), _divisors(MOST_ROWS), _remats()):
        if rows % (shards * held) == 0:
            choice = Choice(slices, ways // fsdp, fsdp, held, rows // (shards * held), remat)
            state, seconds = step.state(choice, sizes), step.seconds(choice)
            found.append(dataclasses.replace(choice, state=state, seconds=seconds))
    if not found:
        raise UserError(
            f"config.data.batch_rows={rows} does not divide over the {shards} devices that hold rows; expected a "
            f"multiple of {shards}"
        )
    fitting = [choice for choice in found if choice.state <= topology.chip.hbm]
    return sorted(fitting, key=lambda choice: (round(math.log(choice.seconds) / ALIKE), choice.state, choice.rows))


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _remats() -> Iterator[dict[str, str]]:
    for kept in itertools.product(*SEARCHED.values()):
        yield dict(zip(SEARCHED, kept, strict=True))


class _Arithmetic:
    """Seconds of a step from FLOPs and bytes, by a chip's published figures; and bytes of its state."""

    def __init__(self, config: ConfigDict, chip: Chip, devices: int):
        self._task = task = planned_task(config)
        self._chip, self._devices, self._flops = chip, devices, task.flops()
        everything, trained = (
            sum(map(_size, jax.tree.leaves(tree))) for tree in (task.shapes, task.split(task.shapes)[0])
        )
        self._moved, self._trained = 2 * everything + trained, trained
        self._sizes: dict[tuple[int, ...], tuple[float, float]] = {}  # of parameters, by mesh

    def state(self, choice: Choice, others: Mapping[str, int]) -> float:
        """Bytes of a device. Where a mesh axis does not divide a parameter, every device holds all of it."""
        mesh = {"slice": choice.slices, "data": choice.data, "fsdp": choice.fsdp, **others}
        axes = tuple(mesh[axis] for axis in AXES)
        if axes not in self._sizes:
            devices = AbstractMesh(axes, AXES, axis_types=(AxisType.Auto,) * len(AXES))
            params = placed(devices, self._task.logical_axes, self._task.shapes)
            trained = self._task.split(params)[0]
            moment = jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, "float32", sharding=leaf.sharding), trained
            )
            self._sizes[axes] = size(params), size(moment)
        params, moment = self._sizes[axes]
        return params + moment * (3 if choice.micro_batches > 1 else 2)

    def seconds(self, choice: Choice) -> float:
        remat = {**choice.remat, "attention": choice.remat["llama"]}
        flops = sum(count * REPEATED[remat.get(part, "none")] for part, count in self._flops.items())
        products = flops / (self._devices * self._chip.flops * PRODUCT_EFFICIENCY)
        # A micro-batch gathers bfloat16 parameters for the forward and for the backward pass, and scatters gradients.
        sharded = 2 * self._moved * (1 - 1 / choice.fsdp) * choice.micro_batches
        # Sums of gradients cross between groups of devices once a step, in float32: twice, as a ring sends.
        share = 2 * 4 * self._trained / choice.fsdp
        replicas, between = share * (1 - 1 / choice.data), share * (1 - 1 / choice.slices)
        return products + (sharded + replicas) / self._chip.interconnect + between / self._chip.network


def _size(leaf: jax.ShapeDtypeStruct) -> int:
    return math.prod(leaf.shape)
