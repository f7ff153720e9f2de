"""Orbax checkpoints of a run: asynchronous, atomic, the newest N, with a digest of every leaf.

    workdir/checkpoints/<step>/ params/ statistics/ optimizer/ meta
                                                               └ config, tokenizer, iterator state, shapes, digests

Converted weights (`streamed.py`) are such a folder without an optimizer, and with `lora/` where adapters stand apart.

A run with `config.optimizer.ema_decay` keeps the exponential moving average (EMA) of its trainable parameters in
`statistics/ema`. Whatever loads a checkpoint takes the EMA in place of those parameters, unless it asks for `raw` ones
(`WEIGHTS`); frozen parameters have none and come from `params`.

Orbax itself does not notice flipped bits in array data; the digests do.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from emu_jax.config import from_json
from emu_jax.data.tokenizer import Tokenizer
from emu_jax.errors import UserError
from emu_jax.models import emu, lora, unet, vae
from emu_jax.models.paths import flatten, nest
from emu_jax.sharding import replicated, tree_shardings

FOLDER = "checkpoints"
EMU = ("pretrain", "instruct")  # objectives of checkpoints that hold a whole Emu
PARTS_ALONE = ("llama", "vision")  # objectives of checkpoints that hold a part of Emu, to begin training from
# What is read of a checkpoint: its EMA where it keeps one; the last step's parameters; its EMA, or else an error.
WEIGHTS = ("auto", "raw", "ema")
EMA_PREFIX = "statistics/ema/"


def named_leaves(items: Mapping[str, Any]) -> dict[str, Any]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in jax.tree.leaves_with_path(items)
    }


def _digest(leaf: jax.Array) -> jax.Array:
    """uint32 []: sum over words of word * odd multiplier of its position, modulo 2^32.

    An odd multiplier is invertible, so one changed word always changes the sum; integer sums do not depend on how the
    leaf is split over devices. A word is an element, or a half of one that takes 8 bytes.
    """
    if leaf.dtype == jnp.bool_:
        leaf = leaf.astype(jnp.uint8)
    unsigned = {1: jnp.uint8, 2: jnp.uint16}.get(leaf.dtype.itemsize, jnp.uint32)
    words = jax.lax.bitcast_convert_type(leaf, unsigned).astype(jnp.uint32)
    multiplier = jnp.ones((), jnp.uint32)
    for axis, size in enumerate(words.shape):
        index = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        multiplier = multiplier * jnp.uint32(size * 2 + 1) + index * jnp.uint32(2)
    return jnp.sum(words * (multiplier | jnp.uint32(1)), dtype=jnp.uint32)


# One program for all leaves: hundreds of small ones with collectives starve each other on simulated devices.
_digests = jax.jit(lambda leaves: jax.tree.map(_digest, leaves))


def digests(items: Mapping[str, Any]) -> dict[str, int]:
    """A digest for every leaf, by name."""
    values = jax.device_get(_digests(named_leaves(items)))
    return {name: int(value) for name, value in values.items()}


def pack_tokenizer(tokenizer: Tokenizer | None) -> dict[str, Any]:
    """A tokenizer as metadata keeps it."""
    if tokenizer is None:
        return {"fingerprint": "none"}
    proto = base64.b64encode(tokenizer.proto).decode()
    return {"proto": proto, "instruct": tokenizer.instruct, "fingerprint": tokenizer.fingerprint}


def unpack_tokenizer(saved: Mapping[str, Any], path: Path) -> Tokenizer | None:
    """The inverse of `pack_tokenizer`; None where none was known."""
    if "proto" not in saved:
        return None
    return Tokenizer(base64.b64decode(saved["proto"]), instruct=saved["instruct"], where=str(path))


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a work directory or checkpoint.

    Raises:
      UserError: it holds none.
    """
    found = unpack_tokenizer(read_meta(newest_folder(path.resolve()))["tokenizer"], path)
    if found is None:
        raise UserError(f"{path}: holds no tokenizer; expected a run on text, or weights converted with --tokenizer")
    return found


def read_meta(folder: Path) -> dict[str, Any]:
    file = folder / "meta" / "metadata"
    if not file.is_file():
        raise UserError(f"{folder}: not a checkpoint of emu_jax; expected {file.relative_to(folder)} in it")
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise corrupt(folder, f"{file.relative_to(folder)} is not JSON") from error


def check_leaves(folder: Path, leaves: Mapping[str, list], items: Mapping[str, Any]) -> None:
    """Raises unless the checkpoint's leaves of `items` have the same names, shapes and dtypes."""
    expected = {name: [list(leaf.shape), str(leaf.dtype)] for name, leaf in named_leaves(items).items()}
    found = {name: leaf for name, leaf in leaves.items() if name.split("/")[0] in items}
    for name in expected | found:
        if found.get(name) != expected.get(name):
            raise UserError(
                f"{folder}: {name} is {_describe(found.get(name))} in the checkpoint, "
                f"{_describe(expected.get(name))} by this config; use the config it was trained with, "
                "or a new work directory"
            )


def _describe(leaf: list | None) -> str:
    return f"{leaf[1]}{leaf[0]}" if leaf else "absent"


def check_digests(folder: Path, meta: Mapping[str, Any], items: Mapping[str, Any]) -> None:
    for name, value in digests(items).items():
        if value != meta["digests"][name]:
            raise corrupt(folder, f"{name} has digest {value:08x}, expected {meta['digests'][name]:08x}")


def corrupt(folder: Path, what: str) -> UserError:
    return UserError(f"{folder}: the checkpoint is corrupt: {what}; delete this folder to use an older checkpoint")


def unreadable(folder: Path, error: BaseException) -> BaseException:
    """What a failed read means to the user; Orbax wraps the error that says it in descriptions of its own objects."""
    while error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, MemoryError | jax.errors.JaxRuntimeError):
        return error  # a full device: the files may well be whole
    return corrupt(folder, (str(error).splitlines() or [type(error).__name__])[0][:200])


def newest_folder(path: Path) -> Path:
    """A work directory's newest checkpoint, or `path` itself when it is a checkpoint."""
    if (path / "meta").is_dir():
        return path
    folder = path / FOLDER
    steps = sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit()) if folder.is_dir() else []
    if not steps:
        raise UserError(f"{path}: no checkpoint; expected {FOLDER}/<step> as `emu-jax train` writes")
    return folder / str(steps[-1])


def check_weights(weights: str) -> None:
    """Raises UserError unless it is one of `WEIGHTS`."""
    if weights not in WEIGHTS:
        raise UserError(f"weights={weights!r} is unknown; choose one of {', '.join(WEIGHTS)}")


def averaged_leaves(path: Path, meta: Mapping[str, Any], weights: str) -> dict[str, str]:
    """Names of parameters -> names of the leaves that hold their EMA, of those to be read so.

    Raises:
      UserError: `weights` is unknown, or "ema" where the checkpoint keeps none.
    """
    check_weights(weights)
    found = {f"params/{name.removeprefix(EMA_PREFIX)}": name for name in meta["leaves"] if name.startswith(EMA_PREFIX)}
    if weights == "ema" and not found:
        raise UserError(
            f"{path}: keeps no EMA (it was made without config.optimizer.ema_decay), and weights=ema asks for it; take "
            "raw ones"
        )
    return {} if weights == "raw" else found


def weights_of_parts(weights: str) -> str:
    """What is read of the checkpoints beside a model's own (decoder, tuned model): raw if its own, else what they keep.

    >>> weights_of_parts("ema")
    'auto'
    """
    return "raw" if weights == "raw" else "auto"


def load_items(
    path: Path, targets: Callable[[ConfigDict, Mapping[str, list]], dict[str, Any]], weights: str = "auto"
) -> tuple[ConfigDict, dict, dict]:
    """Config, items and metadata of a work directory or checkpoint, on the first device.

    `targets` turns the config and the leaves' (shape, dtype) by name, those of the EMA left out, into the wanted items
    as trees of ShapeDtypeStructs; with shardings, they are restored split like that.

    Raises:
      UserError: it does not hold what is wanted, the choice of `WEIGHTS` included, or it is damaged.
    """
    folder = newest_folder(path.resolve())
    meta = read_meta(folder)
    config = from_json(json.dumps(meta["config"]))
    averaged = averaged_leaves(path, meta, weights)
    leaves = {name: leaf for name, leaf in meta["leaves"].items() if not name.startswith(EMA_PREFIX)}
    wanted = targets(config, leaves)
    check_leaves(folder, leaves, wanted)
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    stored: dict[str, jax.ShapeDtypeStruct] = {}  # what is read, under the names it has there
    for name, leaf in flatten(wanted).items():
        dtype = jnp.dtype(meta["leaves"][averaged.get(name, name)][1])
        stored[averaged.get(name, name)] = jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding or device)
    try:
        read = _read(folder, nest(stored))
    except Exception as error:  # as in `restore`: Orbax raises anything for damaged files
        raise unreadable(folder, error) from error
    check_digests(folder, meta, read)
    values = flatten(read)
    items = {name: values[averaged.get(name, name)].astype(leaf.dtype) for name, leaf in flatten(wanted).items()}
    return config, nest(items), meta


def _read(folder: Path, items: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves that are named; others of the same item are not read."""
    with ocp.PyTreeCheckpointer() as checkpointer:
        return {
            name: checkpointer.restore(
                folder / name,
                args=ocp.args.PyTreeRestore(
                    target,
                    restore_args=ocp.checkpoint_utils.construct_restore_args(target),
                    partial_restore=True,
                ),
            )
            for name, target in items.items()
        }


def is_checkpoint(path: Path) -> bool:
    """Whether a folder is a work directory or a checkpoint of ours."""
    return (path / FOLDER).is_dir() or (path / "meta").is_dir()


def load_for_inference(
    path: Path, mesh: Mesh | None = None, weights: str = "auto"
) -> tuple[ConfigDict, dict, dict, Tokenizer | None]:
    """Config, parameters, statistics and tokenizer of a run of pretrain or instruct, or of a converted Emu.

    Parameters are restored split over `mesh`, where one is given: they never exist whole on one device.

    Adapters that were trained here stand beside their kernels; those of a converted Emu-instruct.pt are merged.
    """

    def targets(config: ConfigDict, leaves: Mapping[str, list]) -> dict[str, Any]:
        _check_objective(path, config, *EMU)
        model = emu.EmuConfig.from_dict(config.model)
        items = {"params": emu.abstract(model), "statistics": jax.eval_shape(lambda: emu.initial_statistics(model))}
        adapters = {name: leaf for name, leaf in leaves.items() if name.startswith("lora/")}
        items |= nest({name: jax.ShapeDtypeStruct(*leaf) for name, leaf in adapters.items()})
        if mesh is None:
            return items
        shardings = jax.tree.map(lambda _: replicated(mesh), items)
        shardings["params"] = tree_shardings(mesh, emu.logical_axes(model), items["params"])
        return jax.tree.map(lambda leaf, d: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=d), items, shardings)

    config, items, meta = load_items(path, targets, weights)
    params = items["params"]
    if "lora" in items:
        params = lora.merge(params, items["lora"], meta["source"]["lora"]["alpha"])
    return config, params, items["statistics"], unpack_tokenizer(meta["tokenizer"], path)


def load_part(path: Path, kind: str, weights: str = "auto") -> tuple[ConfigDict, dict, dict]:
    """Config, parameters and statistics of a run of vae or decoder; converted parts have no statistics."""

    def targets(config: ConfigDict, leaves: Mapping[str, list]) -> dict[str, Any]:
        _check_objective(path, config, kind)
        if kind == "vae":
            params = {"vae": vae.abstract(vae.VAEConfig.from_dict(config.vae))}
        else:
            params = {"unet": unet.abstract(unet.UNetConfig.from_dict(config.unet))}
        tracked = "statistics/latent_square" in leaves
        statistics = {"statistics": {"latent_square": jax.ShapeDtypeStruct((), jnp.float32)}} if tracked else {}
        return {"params": params} | statistics

    config, items, _ = load_items(path, targets, weights)
    return config, items["params"], items.get("statistics", {})


def _check_objective(path: Path, config: ConfigDict, *expected: str) -> None:
    if config.objective in PARTS_ALONE:
        raise UserError(
            f"{path}: holds the {config.objective} part alone; a training run begins with it where "
            f"config.init.{config.objective} names it"
        )
    if config.objective not in expected:
        raise UserError(f"{path}: a run of the objective {config.objective}; expected one of {' or '.join(expected)}")
