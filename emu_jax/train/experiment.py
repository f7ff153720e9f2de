"""A config -> everything a run needs: its objective, its stream of batches, its tokenizer. Nothing is written here."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from emu_jax.checkpoints.store import is_checkpoint, read_tokenizer
from emu_jax.data.examples import ExamplePipeline, ExamplesConfig, Images
from emu_jax.data.latents import Latents
from emu_jax.data.pipeline import DataConfig, Pipeline, Stream, train_tokenizer
from emu_jax.data.tokenizer import Tokenizer
from emu_jax.errors import UserError, check_fields, nearest
from emu_jax.models import diffusion, emu, lora, unet, vae
from emu_jax.models.flops import forward_flops
from emu_jax.models.losses import SourceWeights
from emu_jax.models.paths import flatten
from emu_jax.train import objective
from emu_jax.train.global_batch import own_rows
from emu_jax.train.groups import PARTS
from emu_jax.train.optimizer import OptimizerConfig
from emu_jax.train.reach import check_reach


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What `config` asks for.

    Attributes:
      rows: of a batch over all hosts. flops: of a step, analytically; 0 where they are not counted.
      tokenizer: None where the objective reads no text.
      remarks: lines that a run says at start.
    """

    objective: objective.Objective
    stream: Stream
    tokenizer: Tokenizer | None
    rows: int
    flops: float = 0.0
    remarks: tuple[str, ...] = ()


def make_experiment(config: ConfigDict, mesh: Mesh | None = None) -> Experiment:
    """Builds what the config's `objective` names, and fills in the config's sizes that follow from its data.

    The stream gives the rows that this process's devices hold of `mesh`; without one, all.

    Raises:
      UserError: the settings cannot work together.
    """
    kind = config.get("objective", None)
    if kind not in OBJECTIVES:
        raise UserError(f"config.objective={kind!r} is unknown; did you mean {nearest(str(kind), OBJECTIVES)}?")
    return OBJECTIVES[kind](config, lambda rows: list(range(rows)) if mesh is None else own_rows(mesh, rows))


Own = Callable[[int], list[int]]  # rows of a batch -> those that this process reads


def _emu(config: ConfigDict, own: Own) -> Experiment:
    """Pretraining, or adapters on what was pretrained."""
    data = DataConfig.from_dict(config.data)
    tokenizer = make_tokenizer(config, data)
    model = make_model_config(config, tokenizer)
    if config.objective == "instruct" and model.llama.int8 and not (config.get("init", None) or {}).get("emu", ""):
        raise UserError(
            "config.model.llama.int8=True: adapters on int8 weights need weights to begin with; name a checkpoint of "
            "`emu-jax convert --int8` in config.init.emu"
        )
    ids = emu.SpecialIds(tokenizer.pad_id, tokenizer.img_id, tokenizer.img_end_id, tokenizer.image_id)
    sizes = {"queries": model.causal.queries, "image_size": model.vision.image_size}
    stream = Pipeline(data, tokenizer, **sizes, own=own, learn_image_token=model.learn_image_token)
    data = stream.data
    config.data.update({"row_images": data.row_images, "batch_rows": data.batch_rows})
    rows = data.batch_rows
    goals = {"pretrain": objective.pretrain, "instruct": objective.instruct}
    entries = data.sources.items()
    sources = tuple(SourceWeights(name, entry.text_weight, entry.visual_weight) for name, entry in entries)
    optimizer = OptimizerConfig.from_dict(config.optimizer)
    goal = objective.freeze(goals[config.objective](model, ids, sources if len(sources) > 1 else ()), optimizer)
    flops = sum(step_flops(model, rows, data.row_images, data.row_tokens, goal.trains).values())
    trained = {PARTS[name] for name in goal.split(goal.logical_axes)[0]}
    check_reach(trained, stream.samples, model)
    remarks = (_unread(config), stream.fill.remark(data))
    return Experiment(goal, stream, tokenizer, rows, flops, tuple(filter(None, remarks)))


def _unread(config: ConfigDict) -> str:
    """Which entries of the mixture `config.data.source` keeps from being read, in a line; "" for none."""
    named = [name for name, entry in config.data.mixture.items() if entry.get("source") and entry.get("weight", 1)]
    if not config.data.source or not named:
        return ""
    return (
        f"config.data.source={config.data.source} is read alone, not config.data.mixture ({', '.join(named)}); "
        "--config.data.source= mixes those"
    )


def step_flops(
    model: emu.EmuConfig, rows: int, row_images: int, row_tokens: int, trains: Callable[[str], bool]
) -> dict[str, float]:
    """Useful FLOPs of a training step by part.

    A matrix product is as much work again for the gradient of its input, where something below learns, and once more
    for the gradient of its kernel, where that is trained: the share of a part's kernels that is trained counts,
    attention within the encoders included. A kernel that is frozen in part has its whole gradient computed.

    Args:
      trains: the paths of the parameters that are not frozen as a whole (`Objective.trains`).
    """
    shapes = {path: leaf.shape for path, leaf in flatten(emu.abstract(model)).items()}
    trained = [path for path in shapes if trains(path)]

    def learns(*prefixes: str) -> bool:
        return any(path.startswith(prefixes) for path in trained)

    def backward(kernels: list[str], below: bool) -> float:
        """Backward FLOPs over forward FLOPs of these kernels."""
        sizes = {path: math.prod(shapes[path]) for path in kernels}
        return below + sum(size for path, size in sizes.items() if trains(path)) / max(sum(sizes.values()), 1)

    def kernels(*prefixes: str) -> list[str]:
        return [path for path in shapes if path.startswith(prefixes) and path.endswith("/kernel")]

    encoder, blocks, heads = ("vision/", "ln_visual/", "causal/"), "llama/blocks/", ["llama/lm_head/"]
    heads += ["llama/regress_head/"] if model.regression_loss_weight else []
    inputs = learns(*encoder, "llama/embed/")  # of the language model
    hidden = inputs or learns(blocks)
    llama = model.llama
    flops = forward_flops(model, rows * row_images, rows, row_tokens)
    factors = {
        "vision": backward(kernels("vision/"), learns("vision/")),
        "causal": backward(kernels("causal/"), learns(*encoder)),
        "llama": backward(kernels(blocks), hidden),
        "adapters": backward([path for path in shapes if lora.is_adapter(path)], hidden),
        "attention": 2.0 * hidden,
        "heads": backward(kernels(*heads), hidden or learns("llama/final_norm/")),
    }
    useful = {part: (1.0 + factors[part]) * count for part, count in flops.items()}
    targets = {path.split("/")[-2] for path in trained if lora.is_adapter(path)}
    if targets and all(lora.is_adapter(path) for path in trained):
        # What the first layer computes up to its first adapters passes nothing on: nothing below them learns.
        sizes = llama.projection_sizes()
        stages = (("q", "k", "v"), ("o",), ("gate", "up"), ("down",))
        first = next(number for number, stage in enumerate(stages) if targets & set(stage))
        idle = sum(math.prod(sizes[name]) for stage in stages[: first + 1] for name in stage)
        useful["llama"] -= 2.0 * rows * row_tokens * idle
        lowest = sum(sizes[name][0] for name in targets & set(stages[first]))
        useful["adapters"] -= 2.0 * rows * row_tokens * llama.lora_rank * lowest
        # Backwards, attention is four products: the weights' gradient, for q and k, and those of q, k and v.
        needed = len(targets & {"q", "k", "v"}) + bool(targets & {"q", "k"})
        useful["attention"] -= (4 - needed) / 2 * flops["attention"] / llama.layers
    return useful


def make_tokenizer(config: ConfigDict, data: DataConfig) -> Tokenizer:
    """The config's: a .model file, a checkpoint's own, or one trained from the sources, of this run and of later ones
    (`also`). instruct adds [USER] and [ASSISTANT]."""
    settings, instruct = config.tokenizer, config.objective == "instruct"
    if settings.path and is_checkpoint(Path(settings.path)):
        return Tokenizer(read_tokenizer(Path(settings.path)).proto, instruct=instruct)
    if settings.path:
        return Tokenizer.load(Path(settings.path), instruct=instruct)
    size, trained = config.model.vision.image_size, ("vocab_size", "model_type", "also")
    tokenizer = train_tokenizer(data, size, **{name: settings[name] for name in trained})
    return Tokenizer(tokenizer.proto, instruct=instruct)


def make_model_config(config: ConfigDict, tokenizer: Tokenizer) -> emu.EmuConfig:
    """`config.model` with its vocabulary size filled in (0 means the tokenizer's) or checked."""
    if config.model.llama.vocab_size == 0:
        config.model.llama.vocab_size = tokenizer.vocab_size
    model = emu.EmuConfig.from_dict(config.model)
    if model.llama.vocab_size != tokenizer.vocab_size:
        raise UserError(
            f"config.model.llama.vocab_size={model.llama.vocab_size}, but the tokenizer has {tokenizer.vocab_size} "
            "tokens; set it to that, or to 0 to take the tokenizer's"
        )
    return model


def _vae(config: ConfigDict, own: Own) -> Experiment:
    data = ExamplesConfig.from_dict(config.data)
    model = vae.VAEConfig.from_dict(config.vae)
    check_fields(objective.VAELossConfig, "config.loss", config.loss)
    weights = objective.VAELossConfig(**config.loss)
    if config.image_size < 1 or config.image_size % model.reduction:
        raise UserError(f"config.image_size={config.image_size}; this VAE needs a multiple of {model.reduction}")
    images = Images(data.source, data.split, config.image_size)
    stream = ExamplePipeline(images, data, own=own(data.batch))
    goal = objective.freeze(objective.train_vae(model, weights), OptimizerConfig.from_dict(config.optimizer))
    return Experiment(goal, stream, None, data.batch)


def _decoder(config: ConfigDict, own: Own) -> Experiment:
    data = ExamplesConfig.from_dict(config.data)
    latents = Latents(Path(data.source))
    (height, _, channels), (queries, dim) = latents.latent_shape, latents.condition_shape
    _fill(config, "latent_size", height, data.source)
    _fill(config, "queries", queries, data.source)
    _fill(config.unet, "latent_channels", channels, data.source)
    _fill(config.unet, "condition_dim", dim, data.source)
    model = unet.UNetConfig.from_dict(config.unet)
    check_fields(objective.DecoderLossConfig, "config.loss", config.loss)
    weights = objective.DecoderLossConfig(**config.loss)
    schedule = diffusion.Schedule.from_dict(config.schedule)
    goal = objective.train_decoder(model, schedule, weights, jnp.asarray(latents.unconditional))
    goal = objective.freeze(goal, OptimizerConfig.from_dict(config.optimizer))
    return Experiment(goal, ExamplePipeline(latents, data, own=own(data.batch)), None, data.batch)


def _fill(fields: ConfigDict, name: str, value: int, source: str) -> None:
    """Sets a size that is 0 to the data's, or raises where it is another."""
    fields[name] = fields[name] or value
    if fields[name] != value:
        raise UserError(
            f"config {name}={fields[name]}, but the examples in {source} have {value}; set it to that, or to 0 to take "
            "theirs"
        )


OBJECTIVES = {"pretrain": _emu, "instruct": _emu, "vae": _vae, "decoder": _decoder}
