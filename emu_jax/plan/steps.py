"""The steps that can be planned, each as something that compiles at any depth: training any objective, decoding.

In: a config and a mesh of devices, described or real. Out: a `Step`. `shallow` makes the small configs from which
costs are read: one layer a part, written out, the loss in one chunk, so that no work hides in a loop.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh
from ml_collections import ConfigDict

from emu_jax.errors import UserError
from emu_jax.models import diffusion, emu, unet
from emu_jax.models.flops import unet_forward_flops
from emu_jax.models.layers import Array
from emu_jax.models.llama import KVCache
from emu_jax.models.paths import flatten
from emu_jax.plan.program import Cost, cost
from emu_jax.sharding import ROWS, replicated, sharding, tree_shardings
from emu_jax.train import objective
from emu_jax.train.compiler import compiler_options
from emu_jax.train.experiment import step_flops
from emu_jax.train.global_batch import batch_shardings
from emu_jax.train.optimizer import OptimizerConfig
from emu_jax.train.state import abstract_state
from emu_jax.train.step import compile_step

VOCABULARY = 32_004  # LLaMA's 32,000 and four special tokens, where the config leaves it to the tokenizer
IDS = emu.SpecialIds(pad=0, img=1, img_end=2, image=3)


@dataclasses.dataclass(frozen=True)
class Step:
    """A step ready to be compiled.

    Attributes:
      rows, row_name: of a batch over all devices. tokens: of a batch; 0 where images are what counts.
      flops: useful FLOPs by part over all devices, analytically. attention_flops: of them, in the language model's
        attention, which a kernel may compute unseen by the compiler.
      held: bytes a device of what lives from step to step, by kind. moving: of gradients, at their most.
      batch: its arrays, described. compile: the compiler's options -> the step's executable.
    """

    rows: int
    row_name: str
    tokens: int
    flops: dict[str, float]
    attention_flops: float
    held: dict[str, float]
    moving: float
    batch: Any
    compile: Callable[[dict[str, Any]], jax.stages.Compiled]
    mesh: Mesh

    def build(self) -> tuple[jax.stages.Compiled, Cost]:
        """Compiles; returns the executable and the cost of its program (loops' bodies counted once)."""
        with jax.set_mesh(self.mesh), tempfile.TemporaryDirectory() as folder:
            # The executable's own text is refused for large programs; the compiler's dump is not.
            executable = self.compile({"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
            names = sorted(Path(folder).glob("*after_optimizations.txt"))
            return executable, cost(executable, names[-1].read_text(encoding="utf-8"), self.mesh)


def size(tree: Any) -> float:
    """Bytes of a device's parts of described arrays."""
    leaves = jax.tree.leaves(tree)
    return float(sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves))


def placed(mesh: Mesh, axes: Any, shapes: Any) -> Any:
    """Described arrays with the shardings that the table gives them."""
    places = tree_shardings(mesh, axes, shapes)
    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, places)


def _rows(mesh: Mesh) -> int:
    return math.prod(mesh.shape[axis] for axis in ROWS)


def _batch(mesh: Mesh, shapes: dict[str, tuple[tuple[int, ...], Any]]) -> dict[str, jax.ShapeDtypeStruct]:
    arrays = {name: jax.ShapeDtypeStruct(*shape) for name, shape in shapes.items()}
    places = batch_shardings(mesh, arrays)
    return {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=places[name]) for name, x in arrays.items()}


def _training_step(
    goal: objective.Objective, config: ConfigDict, mesh: Mesh, batch: dict[str, jax.ShapeDtypeStruct], **fields: Any
) -> Step:
    optimizer = OptimizerConfig.from_dict(config.optimizer)
    state = abstract_state(goal, optimizer, mesh)
    arguments = goal.batch(**batch)
    ema = size(state.statistics.get("ema", {}))
    tuned = compiler_options(mesh.devices.flat[0].device_kind, config.train.get("tuned", False))
    return Step(
        held={
            "parameters": size(state.params),
            "optimizer": size(state.opt_state),
            **({"EMA": ema} if ema else {}),
            "batch and statistics": size(batch) + size(state.statistics) - ema,
        },
        moving=size(goal.split(state.params)[0]),
        batch=arguments,
        compile=functools.partial(_compile, goal, optimizer, config.train.seed, state, arguments, tuned),
        mesh=mesh,
        **fields,
    )


def _compile(
    goal: objective.Objective,
    optimizer: OptimizerConfig,
    seed: int,
    state: Any,
    batch: Any,
    tuned: dict[str, str],
    options: dict[str, Any],
) -> jax.stages.Compiled:
    return compile_step(goal, optimizer, seed, state, batch, tuned | options)


# ---- pretraining and instruction tuning ----------------------------------------------------------------------------


def pretrain(config: ConfigDict, mesh: Mesh, rows_per_device: int) -> Step:
    """The step of `configs/pretrain.py`."""
    return _emu_step(config, mesh, rows_per_device)


def instruct(config: ConfigDict, mesh: Mesh, rows_per_device: int) -> Step:
    """The step of `configs/instruct.py`."""
    return _emu_step(config, mesh, rows_per_device)


def _emu_step(config: ConfigDict, mesh: Mesh, rows_per_device: int) -> Step:
    model, goal = _emu(config), _goal(config)
    data = config.data
    for name, size in (("row_images", data.row_images), ("batch_rows", rows_per_device or data.batch_rows)):
        if not size:
            raise UserError(
                f"config.data.{name}=0 is measured from the data when a run begins; name a number to plan with, as "
                f"`emu-jax inspect-data` or a run's config.json tells it: --config.data.{name}=…"
            )
    rows = rows_per_device * _rows(mesh) if rows_per_device else data.batch_rows
    length, side = data.row_tokens, model.vision.image_size
    shapes: dict[str, tuple[tuple[int, ...], Any]] = {
        name: ((rows, length), jnp.int32) for name in ("tokens", "segments", "slots")
    }
    shapes |= {name: ((rows, length), jnp.float32) for name in ("text_weights", "visual_weights")}
    shapes["images"] = ((rows, data.row_images, side, side, 3), jnp.uint8)
    goal = objective.freeze(goal, OptimizerConfig.from_dict(config.optimizer))
    flops = step_flops(model, rows, data.row_images, length, goal.trains)
    return _training_step(
        goal,
        config,
        mesh,
        _batch(mesh, shapes),
        rows=rows,
        row_name="rows",
        tokens=rows * length,
        flops=flops,
        attention_flops=flops["attention"],
    )


def _emu(config: ConfigDict) -> emu.EmuConfig:
    config = config.copy_and_resolve_references()
    config.model.llama.vocab_size = config.model.llama.vocab_size or VOCABULARY
    return emu.EmuConfig.from_dict(config.model)


def _goal(config: ConfigDict) -> objective.Objective:
    """What the config trains, nothing frozen yet."""
    goals = {"pretrain": objective.pretrain, "instruct": objective.instruct}
    return goals[config.objective](_emu(config), IDS)


def _frozen_wholes(config: ConfigDict) -> tuple:
    """Groups that freeze what the config's groups freeze as a whole, layer numbers or not."""
    goal = _goal(config)
    frozen = objective.freeze(goal, OptimizerConfig.from_dict(config.optimizer))
    paths = [path for path in flatten(goal.split(goal.logical_axes)[0]) if not frozen.trains(path)]
    return tuple((re.escape(path), 1.0, None, True) for path in paths)


# ---- the visual decoder --------------------------------------------------------------------------------------------


def decoder(config: ConfigDict, mesh: Mesh, rows_per_device: int) -> Step:
    """The step of `configs/decoder.py`; sizes that follow from the examples are the published ones where they are 0."""
    config = config.copy_and_resolve_references()
    side, queries = config.latent_size or 64, config.queries or 32
    config.unet.latent_channels = config.unet.latent_channels or 4
    config.unet.condition_dim = config.unet.condition_dim or 5120
    model = unet.UNetConfig.from_dict(config.unet)
    rows = rows_per_device * _rows(mesh) if rows_per_device else config.data.batch
    condition = (rows, queries, model.condition_dim)
    shapes = {
        "latents": ((rows, side, side, model.latent_channels), jnp.float32),
        "condition": (condition, jnp.float32),
        "encoded": (condition, jnp.float32),
    }
    goal = objective.train_decoder(
        model,
        diffusion.Schedule.from_dict(config.schedule),
        objective.DecoderLossConfig(**config.loss),
        jnp.zeros(condition[1:]),
    )
    goal = objective.freeze(goal, OptimizerConfig.from_dict(config.optimizer))
    flops = unet_forward_flops(model, rows, side, queries)
    return _training_step(
        goal,
        config,
        mesh,
        _batch(mesh, shapes),
        rows=rows,
        row_name="images",
        tokens=0,
        flops={part: 3.0 * count for part, count in flops.items()},
        attention_flops=3.0 * flops["attention"],
    )


# ---- decoding ------------------------------------------------------------------------------------------------------


def decode(config: ConfigDict, mesh: Mesh, rows: int, unroll: int = 1) -> Step:
    """One token for each of `rows` sequences with a full cache of `config.model.llama.context` slots.

    `unroll` layers are written out in the loop over depth.
    """
    config = config.copy_and_resolve_references()
    config.model.param_dtype = config.model.dtype  # what is served
    model = _emu(config)
    llama = model.llama
    params = placed(mesh, emu.logical_axes(model), emu.abstract(model))
    cached = (llama.layers, rows, llama.heads, llama.context, llama.head_dim)
    place = sharding(mesh, ("layers", "batch", "heads", None, None), cached)
    keys = jax.ShapeDtypeStruct(cached, model.dtype, sharding=place)
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

    def compile(options: dict[str, Any]) -> jax.stages.Compiled:
        # The compiler lays the cache out, as it does where this step is the body of a loop (`generate/text.py`).
        free = jax.tree.map(lambda leaf: Format(Layout.AUTO, leaf.sharding), (by_row["tokens"], cache))
        fixed = jax.tree.map(lambda leaf: leaf.sharding, params)
        wrapped = jax.jit(step, donate_argnums=2, in_shardings=(fixed, *free), out_shardings=free)
        return wrapped.lower(params, by_row["tokens"], cache).compile(compiler_options=options)

    matmuls = llama.layers * (4 * llama.width**2 + 3 * llama.width * llama.mlp_dim) + llama.width * llama.vocab_size
    attention = 2 * llama.layers * llama.width * llama.context
    # The regression head and, but for the rows looked up, the token embedding are held and not read; of a token head
    # that does not divide, each device needs its part.
    weights = params["llama"]
    head = weights["lm_head"]["kernel"]
    read = size(weights) - size(weights["regress_head"]) - size(weights["embed"]) - size(head)
    read += math.prod(head.shape) * head.dtype.itemsize / mesh.shape["tensor"]
    return Step(
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
        compile=compile,
        mesh=mesh,
    )


# ---- all of them ---------------------------------------------------------------------------------------------------

# The parts that are scanned over depth, and whose layers' cost is a difference of two programs.
SCANNED = {pretrain: tuple(emu.PARTS), instruct: tuple(emu.PARTS), decoder: ()}


def scanned(kind: Callable[..., Step], config: ConfigDict) -> tuple[str, ...]:
    """The scanned parts of a config's step; pooled patches have no layers."""
    return tuple(part for part in SCANNED[kind] if config.model[part].get("kind", "") != "pooled")


def shallow(config: ConfigDict, depths: dict[str, int]) -> ConfigDict:
    """The config with so many layers a part, nothing in a loop."""
    config = config.copy_and_resolve_references()
    if depths:
        config.model.unroll = True
        config.model.loss_chunk = config.data.row_tokens
        config.optimizer.groups = _frozen_wholes(config)  # layers that are not there cannot be named
    for part, layers in depths.items():
        config.model[part].layers = layers
    return config


def step_kind(config: ConfigDict) -> Callable[[ConfigDict, Mesh, int], Step]:
    """The step that a config trains.

    Raises:
      UserError: it cannot be planned.
    """
    kinds = {"pretrain": pretrain, "instruct": instruct, "decoder": decoder}
    kind = config.get("objective")
    if kind not in kinds:
        raise UserError(f"config.objective={kind!r} cannot be planned; expected one of {sorted(kinds)}")
    return kinds[kind]
