"""Initialises a run from checkpoints: parts that `emu-jax convert` made of published files, or earlier runs.

    config.init.emu       a whole Emu, converted or trained here, with its statistics
    config.init.llama     LLaMA: the language model without its visual head
    config.init.vision    EVA-CLIP's visual tower, or the vision encoder of an Emu with its ln_visual
    config.init.encoder   an Emu's vision encoder, Causal Transformer and statistics: images become its embeddings
    config.init.codebook  the vector quantiser of a `codebook` run, for the visual head `codes`
    config.init.unet      Stable Diffusion's U-Net; keys and values of another condition width stay fresh

Each is a path, or a shipped model's name ("emu-mini"). The paper begins pretraining with LLaMA, EVA-CLIP and a fresh
Causal Transformer. Parts that are not named stay fresh. If a checkpoint keeps an EMA, the EMA is used.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from emu_jax.checkpoints.load import load_leaves
from emu_jax.checkpoints.shipped import model_path
from emu_jax.checkpoints.store import Checkpoint, open_checkpoint
from emu_jax.errors import UserError
from emu_jax.models import emu, lora
from emu_jax.models.heads.codes import Codes
from emu_jax.models.heads.registry import PUBLISHED
from emu_jax.models.paths import flatten, nest
from emu_jax.storage import Path
from emu_jax.train.state import TrainState, ema_of
from emu_jax.train.tasks.task import InitPart

log = logging.getLogger(__name__)

# Fields that may differ: a vocabulary can grow; the others do not change what the parameters mean.
FREE = {"vocab_size", "context", "drop_path", "dropout", "condition_dim", "remat", "dtype", "param_dtype", "unroll"}
FREE |= {"loss_chunk", "text_loss_weight", "regression_loss_weight", "attention"}
FREE |= {"init", "float32_gradients", "loss_mean", "learn_image_token", "visual_head", "input_noise"}
FREE |= {"scheduled_sampling"}
FREE |= {"lora_rank", "lora_alpha", "lora_dropout", "lora_targets"}
VOCABULARY = {"params/llama/embed/embedding": 0, "params/llama/lm_head/kernel": 1}  # leaf -> the axis of tokens
HEAD = f"params/{emu.VISUAL_HEAD}"  # another head than the checkpoint's begins fresh
CONDITION = re.compile(r"params/unet/.*/attn2/to_[kv]/kernel")  # as wide as the condition


def init_from_checkpoints(
    state: TrainState,
    config: ConfigDict,
    parts: Mapping[str, InitPart],
    words: Mapping[int, Sequence[int]] | None = None,
) -> TrainState:
    """A fresh state with the parameters that `config.init` names, in the shardings of the fresh ones.

    Args:
      parts: the fields that `config.init` may have (`Task.init_parts`).
      words: new token -> the old tokens whose mean it begins as (`Tokenizer.role_words`), instead of the mean of all.

    Raises:
      UserError: a checkpoint does not fit the config.
    """
    leaves = {f"params/{name}": value for name, value in flatten(state.params).items()}
    tracked = {name: value for name, value in state.statistics.items() if name != "ema"}
    leaves |= {f"statistics/{name}": value for name, value in tracked.items()}
    fresh_head = {name for name in leaves if name.startswith(HEAD)}
    for field, checkpoint in _open_all(config, parts).items():
        ours = {name: x for name, x in leaves.items() if re.fullmatch(parts[field].taken, name)}
        loaded = _load(checkpoint, ours, words or {}, parts[field].moved)
        if field == "emu" and not fresh_head <= loaded.keys():
            theirs = checkpoint.config.model.get("visual_head", {"name": PUBLISHED.name})["name"]
            log.info("config.init.emu: its visual head is %s; this config's begins fresh", theirs)
        leaves |= loaded
    items = nest(leaves)
    statistics = items.get("statistics", {})
    if "ema" in state.statistics:
        trained = flatten(state.statistics["ema"])
        statistics["ema"] = ema_of(nest({n: x for n, x in flatten(items["params"]).items() if n in trained}))
    return dataclasses.replace(state, params=items["params"], statistics=statistics)


def check_init(config: ConfigDict, parts: Mapping[str, InitPart]) -> None:
    """Raises UserError if `config.init` has an unknown field, or names a checkpoint that is missing or does not fit."""
    _open_all(config, parts)


def _open_all(config: ConfigDict, parts: Mapping[str, InitPart]) -> dict[str, Checkpoint]:
    """The checkpoints by field of `config.init`, checked against the config."""
    init = config.get("init", None) or {}
    for field in init:
        if field not in parts:
            raise UserError(f"config.init.{field} is no part of this model; choose among {', '.join(parts) or 'none'}")
    return {field: _open(field, parts[field], model_path(path), config) for field, path in init.items() if path}


def _open(field: str, part: InitPart, path: Path, config: ConfigDict) -> Checkpoint:
    where = f"config.init.{field}={path}"
    if not path.is_dir():
        raise UserError(f"{where}: no such folder; expected one that `emu-jax convert` or `emu-jax train` wrote")
    checkpoint = open_checkpoint(path)
    if checkpoint.holds not in part.holds:
        raise UserError(f"{where}: holds {checkpoint.holds}; expected {' or '.join(part.holds)}")
    for group in part.groups:
        _check_sizes(where, *_sizes(checkpoint.config, group), _sizes(config, group)[1])
    if field == "emu":
        theirs, ours = (c.model.causal.get("kind", "causal") for c in (checkpoint.config, config))
        if theirs != ours:
            raise UserError(f"{where}: made with model.causal.kind={theirs}, this config has {ours}; set it to that")
    if field == "codebook":
        _check_codebook(where, checkpoint.config, config)
    if any(name.startswith("lora/") or lora.is_adapter(name) for name in checkpoint.leaves):
        raise UserError(f"{where}: holds LoRA beside its weights; convert it with merge_lora")
    return checkpoint


def _sizes(config: ConfigDict, where: str) -> tuple[str, dict[str, Any]]:
    """The fields of a group of the config, or one field, with the name of the group that they are in."""
    *groups, last = where.split(".")
    for name in groups:
        config = config[name]
    found = config[last]
    return (where, found.to_dict()) if isinstance(found, ConfigDict) else (".".join(groups), {last: found})


def _check_sizes(where: str, group: str, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    theirs, ours = _spelt_out(theirs), _spelt_out(ours)
    for name, value in theirs.items():
        field = f"{group}.{name}"
        if name in FREE:
            continue
        if isinstance(value, Mapping):
            _check_sizes(where, field, value, ours[name])
        elif name in ours and _plain(ours[name]) != _plain(value):
            raise UserError(f"{where}: made with {field}={value}, this config has {ours[name]}; set it to that")
    vocabulary = theirs.get("vocab_size", 0)
    if ours.get("vocab_size", 0) and vocabulary > ours["vocab_size"]:
        raise UserError(
            f"{where}: has {vocabulary} tokens, this config's {group}.vocab_size is {ours['vocab_size']}; name the "
            "tokenizer that belongs to it"
        )


def _check_codebook(where: str, theirs: ConfigDict, ours: ConfigDict) -> None:
    """Raises UserError unless a codebook's sizes are those of the config's visual head."""
    model = emu.EmuConfig.from_dict(ours.model)
    if not isinstance(model.visual_head, Codes):
        raise UserError(f"{where}: model.visual_head.name={model.visual_head.name} has no codebook; set it to codes")
    for name, own in dataclasses.asdict(model.visual_head.sizes).items():
        if theirs.codebook[name] != own:
            raise UserError(
                f"{where}: made with codebook.{name}={theirs.codebook[name]}, this config has "
                f"model.visual_head.{name}={own}; set it to that"
            )
    width = theirs.model.llama.width
    if width != model.llama.width:
        raise UserError(
            f"{where}: made with model.llama.width={width}, this config has {model.llama.width}; set it to that"
        )


def _load(
    checkpoint: Checkpoint,
    ours: Mapping[str, jax.Array],
    words: Mapping[int, Sequence[int]],
    moved: Sequence[tuple[str, str]],
) -> dict[str, jax.Array]:
    """The checkpoint's leaves that are among `ours`, in the shapes, dtypes and shardings of these."""
    wanted, names = {}, {}
    for name, (shape, dtype) in checkpoint.leaves.items():
        here = _moved(name, moved)
        if here in ours and _takes(here, tuple(shape), ours[here].shape):
            sharding = _fitting(ours[here].sharding, tuple(shape))
            wanted[name] = jax.ShapeDtypeStruct(tuple(shape), jnp.dtype(dtype), sharding=sharding)
            names[name] = here
    loaded = {names[name]: value for name, value in load_leaves(checkpoint, wanted).items()}
    return {
        name: _grown(value, ours[name], VOCABULARY[name], words)
        if value.shape != ours[name].shape
        else value.astype(ours[name].dtype)
        for name, value in loaded.items()
    }


def _moved(name: str, moved: Sequence[tuple[str, str]]) -> str:
    """The name here of a checkpoint's leaf (`InitPart.moved`)."""
    for theirs, ours in moved:
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name


def _spelt_out(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a group, with the number of `kv_heads` where 0 stands for as many as `heads`."""
    return {name: fields["heads"] if name == "kv_heads" and not value else value for name, value in fields.items()}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple | list) else value


def _takes(name: str, shape: tuple[int, ...], ours: tuple[int, ...]) -> bool:
    """Whether a leaf is used: not if it is of another visual head or another width of the condition."""
    return name in VOCABULARY or shape == ours or not (CONDITION.fullmatch(name) or name.startswith(HEAD))


def _fitting(sharding: Any, shape: tuple[int, ...]) -> Any:
    """The sharding without the axes that it does not divide, such as a smaller vocabulary."""
    if not isinstance(sharding, NamedSharding):
        return sharding
    names = [*sharding.spec, *(None,) * (len(shape) - len(sharding.spec))]
    fitting = [name if _divides(sharding.mesh, name, size) else None for name, size in zip(names, shape, strict=True)]
    return NamedSharding(sharding.mesh, PartitionSpec(*fitting))


def _divides(mesh: Mesh | AbstractMesh, names: str | tuple[str, ...] | None, size: int) -> bool:
    axes = (names,) if isinstance(names, str) else names or ()
    return size % math.prod(mesh.shape[axis] for axis in axes) == 0


def _grown(value: jax.Array, like: jax.Array, axis: int, words: Mapping[int, Sequence[int]]) -> jax.Array:
    """`value` in the dtype and sharding of `like`; new tokens along `axis` are the mean of old ones.

    The published code initialises new tokens like this; [USER] and [ASSISTANT] begin as "user" and "assistant" (from
    one set of notes on the paper).
    """

    def grow(value: jax.Array) -> jax.Array:
        wide = value.astype(jnp.float32)
        added = range(value.shape[axis], like.shape[axis])
        means = [wide.take(jnp.array(words[token]), axis) if token in words else wide for token in added]
        wide = jnp.concatenate([wide, *(tokens.mean(axis, keepdims=True) for tokens in means)], axis=axis)
        return wide.astype(like.dtype)

    return jax.jit(grow, out_shardings=like.sharding)(value)
