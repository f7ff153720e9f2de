"""The steps that can be planned: training of a task, and decoding.

In: a config or a task, and a mesh of devices, real or described. Out: a `PlannedStep`.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Format, Layout
from jax.sharding import AbstractMesh, Mesh
from ml_collections import ConfigDict

from emu_jax.errors import UserError
from emu_jax.models import emu
from emu_jax.models.layers import Array
from emu_jax.models.llama import KVCache
from emu_jax.models.quantise import element_bytes
from emu_jax.plan.program import Cost, cost
from emu_jax.sharding import replicated, sharding, tree_shardings
from emu_jax.train.compiler import compiler_options
from emu_jax.train.global_batch import batch_shardings
from emu_jax.train.optimizer import OptimizerConfig
from emu_jax.train.state import abstract_state
from emu_jax.train.step import Program, abstract_sums, programs
from emu_jax.train.tasks.interleaved import VOCABULARY
from emu_jax.train.tasks.task import Task, find_task


@dataclasses.dataclass(frozen=True)
class PlannedStep:
    """A step ready to be compiled.

    Attributes:
      rows, row_name: rows of a batch over all devices, and what a row is called.
      tokens: tokens of a batch; 0 where only rows count.
      flops: useful FLOPs by part over all devices, analytically.
      attention_flops: those of them in attention that a kernel may compute, which the compiler does not count.
      held: bytes per device of what is kept between its programs, by kind.
      moving: bytes per device of gradients, at their most.
      batch: ShapeDtypeStructs of a batch.
      lower: makes the step's programs.
      options: the compiler's.
    """

    rows: int
    row_name: str
    tokens: int
    flops: dict[str, float]
    attention_flops: float
    held: dict[str, float]
    moving: float
    batch: Any
    lower: Callable[[], list[Program]]
    mesh: Mesh
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def build(self) -> tuple[list[jax.stages.Compiled], Cost]:
        """Compiles; returns the executables and a step's cost (the body of a loop within a program counts once)."""
        executables, total = [], Cost()
        with jax.set_mesh(self.mesh):
            for program in self.lower():
                with tempfile.TemporaryDirectory() as folder:
                    # `Compiled.as_text` fails for large programs; the compiler's dump does not.
                    dump = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
                    executable = program.compile(self.options | dump)
                    names = sorted(Path(folder).glob("*after_optimizations.txt"))
                    text = names[-1].read_text(encoding="utf-8")
                executables.append(executable)
                total += cost(executable, text, self.mesh) * program.times
        return executables, total


def size(tree: Any) -> float:
    """Bytes per device of described arrays."""
    leaves = jax.tree.leaves(tree)
    return float(sum(math.prod(x.sharding.shard_shape(x.shape)) * element_bytes(x.dtype) for x in leaves))


def placed(mesh: Mesh | AbstractMesh, axes: Any, shapes: Any) -> Any:
    """Described arrays with the shardings of the logical axis rules."""
    shardings = tree_shardings(mesh, axes, shapes)
    return jax.tree.map(lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), shapes, shardings)


# ---- training ------------------------------------------------------------------------------------------------------


def planned_task(config: ConfigDict, rows: int = 0) -> Task:
    """The config's task, made without its data.

    Args:
      rows: rows a batch has, in place of the config's.

    Raises:
      UserError: the task cannot be planned, or a size is known only from the data.
    """
    kind = find_task(config.get("objective", None))
    return kind(kind.resolve_without_data(config, rows))


def training_step(task: Task, mesh: Mesh) -> PlannedStep:
    """The step that `emu-jax train` compiles: with gradient accumulation, every program as often as it runs."""
    config = task.config
    optimizer = OptimizerConfig.from_dict(config.optimizer)
    state = abstract_state(task, optimizer, mesh)
    shapes = task.batch_shapes()
    shardings = batch_shardings(mesh, shapes)
    arrays = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=shardings[name]) for name, x in shapes.items()}
    batch, flops = task.batch(**arrays), task.flops()
    ema = size(state.statistics.get("ema", {}))
    accumulates = optimizer.accumulate_steps > 1
    return PlannedStep(
        rows=task.rows,
        row_name=task.row_name,
        tokens=task.tokens,
        flops=flops,
        attention_flops=flops.get("attention", 0.0),
        held={
            "parameters": size(state.params),
            "optimizer": size(state.opt_state),
            **({"EMA": ema} if ema else {}),
            **({"gradient sums": size(abstract_sums(task, state, batch))} if accumulates else {}),
            "batch and statistics": size(arrays) + size(state.statistics) - ema,
        },
        moving=size(task.split(state.params)[0]),
        batch=batch,
        lower=lambda: programs(task, optimizer, config.train.seed, state, batch),
        mesh=mesh,
        options=compiler_options(mesh.devices.flat[0].device_kind, config.train.get("tuned", False)),
    )


# ---- decoding ------------------------------------------------------------------------------------------------------


def decode(config: ConfigDict, mesh: Mesh, rows: int, unroll: int = 1) -> PlannedStep:
    """Decodes one token for each of `rows` sequences whose cache of `config.model.llama.context` slots is full.

    Args:
      unroll: layers that an iteration of the loop over depth computes.

    Raises:
      UserError: the config's task trains no Emu.
    """
    if find_task(config.get("objective", None)).holds != "emu":
        raise UserError(
            f"config.objective={config.objective!r}: only Emu decodes text; expected a config with a model, such as "
            "configs/pretrain.py"
        )
    config = config.copy_and_resolve_references()
    config.model.param_dtype = config.model.dtype  # as served
    config.model.llama.vocab_size = config.model.llama.vocab_size or VOCABULARY
    model = emu.EmuConfig.from_dict(config.model)
    llama = model.llama
    params = placed(mesh, emu.logical_axes(model), emu.abstract(model))
    cached = (llama.layers, rows, llama.kv_heads, llama.context, llama.head_dim)
    where = sharding(mesh, ("layers", "batch", "heads", None, None), cached)
    keys = jax.ShapeDtypeStruct(cached, model.dtype, sharding=where)
    by_row = {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding(mesh, ("batch", None), shape))
        for name, shape, dtype in (
            ("tokens", (rows, 1), jnp.int32),
            ("valid", (rows, llama.context), jnp.bool_),
        )
    }
    index = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated(mesh))
    cache = KVCache(keys, keys, by_row["valid"], index)  # type: ignore[arg-type]  # described, not allocated

    def step(params: dict, tokens: Array, cache: KVCache) -> tuple[Array, KVCache]:
        network = emu.bind(model, params).llama
        position = jnp.broadcast_to(cache.index, tokens.shape)
        hidden, cache = network.decode(network.embed(tokens).astype(model.dtype), position, cache, unroll=unroll)
        return network.logits(hidden).argmax(-1).astype(jnp.int32), cache

    def lower() -> list[Program]:
        # The compiler chooses the cache's layout, as it does for the body of the loop in `generate/text.py`.
        chosen = jax.tree.map(lambda leaf: Format(Layout.AUTO, leaf.sharding), (by_row["tokens"], cache))
        fixed = jax.tree.map(lambda leaf: leaf.sharding, params)
        wrapped = jax.jit(step, donate_argnums=2, in_shardings=(fixed, *chosen), out_shardings=chosen)
        return [Program("decode", 1, wrapped.lower(params, by_row["tokens"], cache))]

    matmuls = llama.layers * sum(inputs * outputs for inputs, outputs in llama.projection_sizes().values())
    matmuls += llama.width * llama.vocab_size
    attention = 2 * llama.layers * llama.width * llama.context
    # The regression head is never read, and of the token embedding only a few rows. Each device reads its share of the
    # token head, even where the head does not divide over the devices and every device holds all of it.
    weights = params["llama"]
    head = weights["lm_head"]["kernel"]
    read = size(weights) - size(weights["visual_head"]) - size(weights["embed"]) - size(head)
    read += math.prod(head.shape) * element_bytes(head.dtype) / mesh.shape["tensor"]
    return PlannedStep(
        rows=rows,
        row_name="sequences",
        tokens=rows,
        flops={"llama": 2.0 * rows * (matmuls + attention)},
        attention_flops=0.0,
        held={
            "weights read": read,
            "weights not read": size(weights) - read,
            "cache": size((cache.k, cache.v)),
        },
        moving=0.0,
        batch=by_row["tokens"],
        lower=lower,
        mesh=mesh,
    )
