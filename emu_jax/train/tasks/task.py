"""What a kind of run must define, and the registry that turns `config.objective` into one.

    pretrain   Emu on interleaved documents                     configs/quickstart.py
    end_to_end Emu and its U-Net, in one step                   configs/end_to_end.py
    instruct   low-rank adapters of Emu's language model        configs/instruct.py
    codebook   a vector quantiser of Emu's embeddings           configs/codebook.py
    vae        the visual decoder's VAE, on images              configs/vae.py
    decoder    the visual decoder's U-Net                       configs/decoder.py

The loop, the step, the state, plans and benchmarks ask the task; none of them knows its name. A task of your own is a
subclass of `Task`, named as `config.objective="package.module:Class"`, or added under a name of its own
by an entry point of the group `emu_jax.tasks` in your package.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from emu_jax.data.pipeline import Stream
from emu_jax.data.tokenizer import Tokenizer
from emu_jax.errors import UserError, nearest
from emu_jax.models.layers import Array
from emu_jax.models.paths import split
from emu_jax.train.global_batch import own_rows, row_parts
from emu_jax.train.optimizer import OptimizerConfig

Batch = Any  # a pytree of arrays [B, …]
OwnRows = Callable[[int], list[int]]  # B -> the rows of a batch that this process reads

TASKS = {
    "pretrain": "emu_jax.train.tasks.pretrain:Pretrain",
    "end_to_end": "emu_jax.train.tasks.end_to_end:EndToEnd",
    "instruct": "emu_jax.train.tasks.instruct:Instruct",
    "codebook": "emu_jax.train.tasks.codebook:TrainCodebook",
    "vae": "emu_jax.train.tasks.vae:TrainVAE",
    "decoder": "emu_jax.train.tasks.decoder:TrainDecoder",
}
ENTRY_POINTS = "emu_jax.tasks"


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What a run reads; opened once.

    Attributes:
      config: the run's config, with every size that follows from the data.
      stream: batches, of which each process reads its own rows.
      tokenizer: None where the task reads no text.
      remarks: lines that a run prints when it starts.
    """

    config: ConfigDict
    stream: Stream
    tokenizer: Tokenizer | None = None
    remarks: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class InitPart:
    """A field of `config.init`: parameters that a run may take from a checkpoint.

    Attributes:
      groups: the config's groups and fields of sizes, with dots, that must agree with the checkpoint's.
      holds: what the checkpoint may hold.
      taken: a regular expression that a leaf's whole name must match (`re.fullmatch`) to be taken.
      moved: pairs (prefix of a leaf's name in the checkpoint, prefix of its name here), where these differ.
    """

    groups: tuple[str, ...]
    holds: tuple[str, ...]
    taken: str = ".*"
    moved: tuple[tuple[str, str], ...] = ()


class Task(Protocol):
    """A kind of run, made from a resolved config and, for a run, its inputs. Subclasses inherit the defaults.

    Attributes:
      holds: what its checkpoints hold: "emu", "codebook", "vae" or "unet".
      plots: metrics to plot, by the name of the figure; those of "losses" may also come by source, as "name/source".
      row_name: what a row of a batch is called.
      init_parts: the fields that `config.init` may name.
      timings: what `bench` times beside input and step (`bench.TIMINGS`), with the task's `model`, an `EmuConfig`.
      config: the resolved config.
      rows: B, over all hosts.
      tokens: tokens of a batch; 0 where only rows count.
      logical_axes, shapes: trees like the parameters, of axis names and of ShapeDtypeStructs.
      trainable: the paths of the parameters that are trained; the others have no gradient and no optimizer state.
      summed: the metrics that add up over micro-batches; the others are averaged.
      scanned: the number of layers of every part that is scanned over depth.
      remat: what the backward pass keeps (`layers.REMAT_POLICIES`).
      held_out_only: metrics that `held_out_metrics` has beside the losses.
      rows_mix: whether a row's loss depends on the other rows beyond the normalisers, so that all of them must be
        computed together.
    """

    holds: ClassVar[str]
    plots: ClassVar[Mapping[str, Sequence[str]]]
    row_name: ClassVar[str]
    init_parts: ClassVar[Mapping[str, InitPart]] = {}
    timings: ClassVar[Sequence[str]] = ()
    held_out_only: ClassVar[Sequence[str]] = ()
    config: ConfigDict
    rows: int
    tokens: int = 0
    logical_axes: dict[str, Any]
    shapes: dict[str, Any]
    trainable: frozenset[str]
    scanned: Mapping[str, int] = {}
    remat: str = "none"
    rows_mix: bool = False

    def __init__(self, config: ConfigDict, inputs: Any = None): ...

    @property
    def summed(self) -> frozenset[str]: ...

    @classmethod
    def open(cls, config: ConfigDict, own: OwnRows) -> Inputs:
        """Opens the data and resolves the config with it; returns a new config and leaves the given one as it is."""
        ...

    @classmethod
    def open_held_out(cls, config: ConfigDict, own: OwnRows, inputs: Inputs) -> Inputs:
        """Opens held-out data for a run.

        Args:
          config: the run's, resolved, with other data.
          inputs: the run's.
        """
        return cls.open(config, own)

    @classmethod
    def resolve_without_data(cls, config: ConfigDict, rows: int = 0) -> ConfigDict:
        """Returns a new config with every size filled in, to plan with.

        Args:
          rows: B, in place of the config's.

        Raises:
          UserError: a size is known only from the data, or the task cannot be planned.
        """
        raise UserError(f"config.objective={config.objective!r} cannot be planned: its FLOPs are not counted")

    @classmethod
    def documents(cls, config: ConfigDict) -> Any:
        """The documents that `inspect-data` shows (`interleaved.PackedDocuments`); None where there are none."""
        return None

    def init(self, key: Array) -> tuple[dict[str, Any], dict[str, Any]]:
        """Fresh parameters, and statistics: what training tracks but does not differentiate."""
        ...

    def is_trainable(self, path: str) -> bool:
        return path in self.trainable

    def split(self, params: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Parameters, or a tree like them -> the trainable ones and the frozen ones."""
        return split(params, self.is_trainable)

    def batch(self, **arrays: Any) -> Batch:
        """A batch from its arrays by name."""
        return arrays

    def batch_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The arrays of a batch over all hosts, by name; plans ask for them."""
        ...

    def normalisers(self, batch: Batch) -> Any:
        """What the losses of the whole batch are divided by; micro-batches are divided by it too, and add up."""
        ...

    def loss(
        self, params: dict[str, Any], statistics: dict[str, Any], batch: Batch, key: Array, normalisers: Any
    ) -> tuple[Array, tuple[dict[str, Array], dict[str, Any]]]:
        """The loss [], its metrics, and the new statistics."""
        ...

    def held_out_metrics(
        self, params: dict[str, Any], statistics: dict[str, Any], batch: Batch, key: Array
    ) -> dict[str, Array]:
        """The metrics of `loss` on a batch that the run does not learn from."""
        return self.loss(params, statistics, batch, key, self.normalisers(batch))[1][0]

    def flops(self) -> dict[str, float]:
        """Useful FLOPs of a step over all devices, by part; empty where they are not counted.

        `attention` is the part that an attention kernel may compute, which compilers do not count.
        """
        return {}

    def shallow(self, depths: Mapping[str, int], remat: str | None = None) -> Task:
        """The same task with so many layers of each scanned part, written out, and no loop in its step."""
        return self


def find_task(objective: Any) -> type[Task]:
    """The task of `config.objective`: one of `TASKS`, the name of an entry point, or "package.module:Class".

    Raises:
      UserError: there is no such task, or it cannot be imported.
    """
    name = str(objective)
    if name in TASKS or ":" in name:
        return _load(name, lambda: _import(TASKS.get(name, name)))
    added = importlib.metadata.entry_points(group=ENTRY_POINTS)
    if name in added.names:
        return _load(name, added[name].load)
    known = {*TASKS, *added.names}
    raise UserError(
        f"config.objective={objective!r} is unknown; did you mean {nearest(name, known)}? A task of your own is named "
        "as package.module:Class"
    )


def _import(spec: str) -> Any:
    module, _, attribute = spec.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _load(name: str, load: Callable[[], Any]) -> type[Task]:
    try:
        return load()
    except Exception as error:  # a module of the user's may raise anything
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(
            f"config.objective={name}: cannot be imported ({reason}); expected a task, as package.module:Class"
        ) from error


def make_task(config: ConfigDict, mesh: Mesh | None = None) -> tuple[Task, Inputs]:
    """The task that a config names, and its data; nothing is written, and the config is left as it is.

    Args:
      mesh: the stream gives the rows that this process's devices hold; without a mesh, all.

    Raises:
      UserError: the settings cannot work together.
    """
    kind = find_task(config.get("objective", None))
    if config.data.get("shards", None) == 0:
        config = config.copy_and_resolve_references()
        config.data.shards = 1 if mesh is None else row_parts(mesh)
    inputs = kind.open(config, lambda rows: list(range(rows)) if mesh is None else own_rows(mesh, rows))
    return kind(inputs.config, inputs), inputs


def fill_sizes(config: ConfigDict, sizes: Mapping[str, int], source: str) -> ConfigDict:
    """A copy of the config with sizes of 0 replaced by those of the data.

    >>> config = ConfigDict({"unet": {"condition_dim": 0}})
    >>> fill_sizes(config, {"unet.condition_dim": 64}, "the examples have").unet.condition_dim
    64

    Raises:
      UserError: a size is neither 0 nor that of the data.
    """
    config = config.copy_and_resolve_references()
    for name, size in sizes.items():
        *groups, field = name.split(".")
        node = config
        for group in groups:
            node = node[group]
        node[field] = node[field] or size
        if node[field] != size:
            raise UserError(
                f"config.{name}={node[field]}, but {source} {size}; set it to that, or to 0 to take it from there"
            )
    return config


def trainable_paths(axes: Mapping[str, Any], shapes: Mapping[str, Any], optimizer: OptimizerConfig) -> frozenset[str]:
    """The paths of the parameters that the optimizer's settings do not freeze as a whole.

    Args:
      axes, shapes: the parameters that the task would train, as in `Task`.

    Raises:
      UserError: the settings do not fit these parameters (`OptimizerConfig.check`).
    """
    optimizer.check(axes, shapes)
    found = optimizer.hyperparameters(axes, shapes)
    return frozenset(path for path, hyperparameters in found.items() if not hyperparameters.frozen)


def unread_mixture(config: ConfigDict) -> str:
    """The entries of the mixture that `config.data.source` replaces, in one line; "" where there are none."""
    named = [name for name, entry in config.data.mixture.items() if entry.get("source") and entry.get("weight", 1)]
    if not config.data.source or not named:
        return ""
    return (
        f"config.data.source={config.data.source} is read on its own, not config.data.mixture ({', '.join(named)}); "
        "--config.data.source= reads the mixture"
    )
