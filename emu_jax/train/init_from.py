"""Where a run's parameters come from when they are not drawn: parts that `emu-jax convert` has made of published files.

    config.init.emu       a whole Emu, converted or trained here, with its statistics (pretrain)
    config.init.llama     LLaMA: everything of the language model but its regression head (pretrain)
    config.init.vision    EVA-CLIP's visual tower, or of an Emu its encoder with ln_visual (pretrain)
    config.init.unet      Stable Diffusion's U-Net; keys and values of another condition width stay fresh (decoder)

The paper begins pretraining with LLaMA, EVA-CLIP and a fresh Causal Transformer. What is not named stays as drawn.
Of a run that keeps an EMA, the EMA is taken (`checkpoint.WEIGHTS`).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from emu_jax.checkpoints.store import load_items
from emu_jax.errors import UserError
from emu_jax.models.paths import flatten, nest
from emu_jax.train.state import TrainState, ema_of

# init's field -> the config's group whose sizes must agree, and the objective of the checkpoint that it names.
PARTS = {"emu": ("model", "pretrain"), "llama": ("model.llama", "llama"), "vision": ("model.vision", "vision")}
PARTS |= {"unet": ("unet", "decoder")}
ENCODER = re.compile(r"params/(vision|ln_visual)/.*")  # what init.vision takes of an Emu
# Sizes that may differ: what is added to a vocabulary or read anew; the rest say how something is computed or stored.
FREE = {"vocab_size", "context", "drop_path", "dropout", "condition_dim", "remat", "dtype", "param_dtype", "unroll"}
FREE |= {"loss_chunk", "text_loss_weight", "regression_loss_weight", "attention"}
FREE |= {"init", "float32_gradients", "loss_mean", "learn_image_token"}
FREE |= {"lora_rank", "lora_alpha", "lora_dropout", "lora_targets"}
VOCABULARY = {"params/llama/embed/embedding": 0, "params/llama/lm_head/kernel": 1}  # leaf -> the axis of tokens
CONDITION = re.compile(r"params/unet/.*/attn2/to_[kv]/kernel")  # as wide as the condition


def begin(state: TrainState, config: ConfigDict, words: Mapping[int, Sequence[int]] | None = None) -> TrainState:
    """A fresh state with the parameters of the parts that `config.init` names, split over the mesh as they were.

    Args:
      words: new tokens that begin as the mean of these old ones (`Tokenizer.role_words`), not of all.

    Raises:
      UserError: a part does not fit the config.
    """
    leaves = {f"params/{name}": value for name, value in flatten(state.params).items()}
    tracked = {name: value for name, value in state.statistics.items() if name != "ema"}
    leaves |= {f"statistics/{name}": value for name, value in tracked.items()}
    for part, path in _named(config).items():
        leaves |= _load(part, Path(path), config, leaves, words or {})
    items = nest(leaves)
    statistics = items.get("statistics", {})
    if "ema" in state.statistics:
        trained = flatten(state.statistics["ema"])
        statistics["ema"] = ema_of(nest({n: x for n, x in flatten(items["params"]).items() if n in trained}))
    return dataclasses.replace(state, params=items["params"], statistics=statistics)


def check_init(config: ConfigDict) -> None:
    """Raises UserError where `config.init` names a part that is unknown, not there, or of other sizes."""
    for part, path in _named(config).items():
        _load(part, Path(path), config, None, {})


def _named(config: ConfigDict) -> dict[str, str]:
    init = config.get("init", None) or {}
    for part in init:
        group = PARTS.get(part, ("", ""))[0]
        if not group or group.split(".")[0] not in config:
            known = [name for name, (where, _) in PARTS.items() if where.split(".")[0] in config]
            raise UserError(f"config.init.{part} is no part of this model; choose among {', '.join(known)}")
    return {part: path for part, path in init.items() if path}


def _load(
    part: str,
    path: Path,
    config: ConfigDict,
    ours: Mapping[str, jax.Array] | None,
    words: Mapping[int, Sequence[int]],
) -> dict[str, jax.Array]:
    """The part's leaves by name, in the shapes, dtypes and shardings of `ours`; None: only checks."""
    where, objective = PARTS[part]
    if part == "vision" and ours is not None:
        ours = {name: value for name, value in ours.items() if ENCODER.fullmatch(name)}
    if not path.is_dir():
        raise UserError(f"config.init.{part}={path}: no such folder; expected what `emu-jax convert --to` wrote")

    def targets(theirs: ConfigDict, leaves: Mapping[str, list]) -> dict[str, Any]:
        if theirs.objective != objective and (part, theirs.objective) != ("vision", "pretrain"):
            raise UserError(f"config.init.{part}={path}: holds {theirs.objective}; expected {objective}")
        _check_sizes(part, path, _group(theirs, where), _group(config, where), where)
        if part == "emu" and (kinds := [c.model.causal.get("kind", "causal") for c in (theirs, config)]) != kinds[::-1]:
            raise UserError(
                f"config.init.{part}={path}: made with model.causal.kind={kinds[0]}, this config has {kinds[1]}; set "
                "it to that"
            )
        if any(name.startswith("lora/") for name in leaves):
            raise UserError(f"config.init.{part}={path}: holds LoRA beside its weights; convert it with --merge-lora")
        if ours is None:
            return {}
        wanted, items = {}, {name.partition("/")[0] for name in ours}
        for name, (shape, dtype) in leaves.items():
            if name.partition("/")[0] in items:  # Orbax restores items whole
                sharding = _fitting(ours[name].sharding, tuple(shape)) if name in ours else None
                wanted[name] = jax.ShapeDtypeStruct(tuple(shape), jnp.dtype(dtype), sharding=sharding)
        return nest(wanted)

    loaded = flatten(load_items(path, targets)[1])
    if ours is None:
        return {}
    taken = {n: x for n, x in loaded.items() if n in ours and _takes(n, x.shape, ours[n].shape)}
    return {name: _grown(value, ours[name], VOCABULARY.get(name), words) for name, value in taken.items()}


def _group(config: ConfigDict, where: str) -> dict[str, Any]:
    for name in where.split("."):
        config = config[name]
    return config.to_dict()


def _check_sizes(part: str, path: Path, theirs: Mapping[str, Any], ours: Mapping[str, Any], where: str) -> None:
    for name, value in theirs.items():
        here = f"{where}.{name}"
        if isinstance(value, Mapping):
            _check_sizes(part, path, value, ours[name], here)
        elif name not in FREE and name in ours and _plain(ours[name]) != _plain(value):
            raise UserError(
                f"config.init.{part}={path}: made with {here}={value}, this config has {ours[name]}; set it to that"
            )
    vocabulary = theirs.get("vocab_size", 0)
    if ours.get("vocab_size", 0) and vocabulary > ours["vocab_size"]:
        raise UserError(
            f"config.init.{part}={path}: has {vocabulary} tokens, this config's {where}.vocab_size is "
            f"{ours['vocab_size']}; name the tokenizer that belongs to it"
        )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple | list) else value


def _takes(name: str, shape: tuple[int, ...], ours: tuple[int, ...]) -> bool:
    """Whether a leaf is taken over; one that depends on the condition's width is not where that differs."""
    return name in VOCABULARY or shape == ours or not CONDITION.fullmatch(name)


def _fitting(sharding: Any, shape: tuple[int, ...]) -> Any:
    """The sharding, or a whole copy on every device where it does not divide a smaller vocabulary."""
    try:
        sharding.shard_shape(shape)
    except ValueError:
        return NamedSharding(sharding.mesh, PartitionSpec())
    return sharding


def _grown(value: jax.Array, like: jax.Array, axis: int | None, words: Mapping[int, Sequence[int]]) -> jax.Array:
    """`value` in the dtype and split of `like`, with the mean of its old tokens as every new one along `axis`.

    The published code starts the rows of new tokens so; those of [USER] and [ASSISTANT] start from "user" and
    "assistant" (from one set of notes on the paper).
    """

    def grow(value: jax.Array) -> jax.Array:
        wide = value.astype(jnp.float32)
        if axis is not None:
            new = like.shape[axis] - value.shape[axis]
            old = value.shape[axis]
            means = [
                wide.take(jnp.array(words[token]), axis) if token in words else wide for token in range(old, old + new)
            ]
            wide = jnp.concatenate([wide, *(tokens.mean(axis, keepdims=True) for tokens in means)], axis=axis)
        return wide.astype(like.dtype)

    return jax.jit(grow, out_shardings=like.sharding)(value)
