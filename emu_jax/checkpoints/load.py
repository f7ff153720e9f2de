"""The one door for weights: a path and what is wanted from it -> parameters on the devices.

    load_emu       Emu from a work directory, a checkpoint, or published files
    load_part      a part of the visual decoder from a work directory, a checkpoint, or a diffusers folder
    load_leaves    single leaves of a checkpoint, by name

Resuming a run is the only other way to read weights (`train/checkpoint.py`). A checkpoint is asked what it holds
(`store.Checkpoint.holds`). The formats of foreign files are described in `convert/`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import re
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from emu_jax.checkpoints import arrays
from emu_jax.checkpoints.convert import diffusers
from emu_jax.checkpoints.convert import emu as published
from emu_jax.checkpoints.convert.conversion import gather
from emu_jax.checkpoints.convert.tensor_files import TensorFile
from emu_jax.checkpoints.digests import on_host
from emu_jax.checkpoints.shipped import model_path
from emu_jax.checkpoints.store import (
    Checkpoint,
    check_digests,
    check_leaves,
    check_weights,
    is_checkpoint,
    open_checkpoint,
)
from emu_jax.data.tokenizer import Tokenizer
from emu_jax.errors import UserError
from emu_jax.models import clip, emu, lora, unet, vae
from emu_jax.models.diffusion import Schedule
from emu_jax.models.paths import flatten, join, nest
from emu_jax.sharding import replicated, tree_shardings
from emu_jax.storage import Path, check_local, copy_folder, is_bucket

# ----------------------------------------------------------------------------------------------------------- Emu


@dataclasses.dataclass(frozen=True)
class LoadedEmu:
    """Emu's weights.

    Attributes:
      params, statistics: nested dicts of jax arrays.
      tokenizer: None if none is stored and none was named.
      source: notes on the foreign files that the weights came from; {} for a run of ours.
    """

    config: emu.EmuConfig
    params: emu.Params
    statistics: emu.Statistics
    tokenizer: Tokenizer | None
    source: dict[str, Any]


def load_emu(
    path: Path | str,
    *,
    tokenizer: Path | str | None = None,
    require_tokenizer: bool = False,
    mesh: Mesh | None = None,
    weights: str = "auto",
    dtype: str = "float32",
    merge_lora: bool = True,
    vision_head_dim: int | None = None,
    llama_head_dim: int = published.LLAMA_HEAD_DIM,
    lora_alpha: float = published.LORA_ALPHA,
) -> LoadedEmu:
    """Loads Emu.

    Adapters that were trained here are stored beside their kernels and stay there. Those of a converted
    Emu-instruct.pt are merged.

    Args:
      path: a shipped model's name (`shipped.MODELS`); a work directory or checkpoint; or published files: a folder with
        multimodal_encoder/pytorch_model.bin (or the folder above its `pretrain`), or a .bin, .pt or .safetensors file.
      tokenizer: SentencePiece .model, in place of the stored tokenizer.
      require_tokenizer: whether to refuse weights without a tokenizer, before any are read.
      mesh: parameters are split over it by the logical axis rules; by default they are on the first device.
      weights: one of `store.WEIGHTS`.
      dtype: published files: float32 or bfloat16. Checkpoints keep their own.
      merge_lora: published files: add adapters to their weights, in float32; otherwise they stay beside them.
      vision_head_dim, llama_head_dim, lora_alpha: published files: values that are not in the files, if they differ
        from the published model's.

    Raises:
      UserError: no weights are there, they are damaged, or they are not an Emu's; lists everything that does not fit.
    """
    path = model_path(path)
    check_weights(weights)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; expected a work directory, a checkpoint or published weights")
    if is_checkpoint(path):
        return _emu_of_checkpoint(path, tokenizer, require_tokenizer, mesh, weights)
    file = published.find_weights(_local(path))
    if weights == "ema":
        raise UserError(f"{path}: published weights have no EMA, and weights=ema asks for one; take raw ones")
    if tokenizer is None and require_tokenizer:
        raise UserError(f"{path}: published weights need tokenizer=…, the path of LLaMA's SentencePiece .model")
    conversion = published.conversion(
        TensorFile(file),
        merge_lora=merge_lora,
        vision_head_dim=vision_head_dim or published.VISION_HEAD_DIM,
        llama_head_dim=llama_head_dim,
        lora_alpha=lora_alpha,
    )
    items, fields = gather(conversion, dtype), conversion.config["model"] | {"param_dtype": dtype}
    params = items["params"]
    if "lora" in items:
        fields = fields | {"llama": fields["llama"] | _adapter_fields(path, conversion.about["lora"], items["lora"])}
        params = join(params, items["lora"])
    config = emu.EmuConfig.from_dict(fields)
    if mesh is None:
        params = jax.tree.map(jnp.asarray, params)
    else:
        params = jax.device_put(params, tree_shardings(mesh, emu.logical_axes(config), params))
    chosen = None if tokenizer is None else _read_tokenizer(tokenizer, config)
    return LoadedEmu(config, params, emu.initial_statistics(config), chosen, conversion.about)


def _local(path: Path) -> pathlib.Path:
    return check_local(path, "a file or folder of published weights, which is memory-mapped,")


def _adapter_fields(path: Path, about: Mapping[str, Any], adapters: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `config.model.llama` that describe the adapters of published files."""
    elsewhere = [name for name in flatten(adapters) if not name.startswith(published.BLOCKS)]
    if len(about["ranks"]) > 1 or elsewhere:
        what = (
            f"an adapter of {elsewhere[0].rpartition('/')[0]}" if elsewhere else f"adapters of ranks {about['ranks']}"
        )
        raise UserError(
            f"{path}: holds {what}; only adapters of LLaMA's blocks, all of one rank, can stay beside the weights; "
            "merge them"
        )
    return {"lora_rank": about["ranks"][0], "lora_alpha": about["alpha"], "lora_targets": tuple(about["targets"])}


def _emu_of_checkpoint(
    path: Path, tokenizer: Path | str | None, require_tokenizer: bool, mesh: Mesh | None, weights: str
) -> LoadedEmu:
    checkpoint = open_checkpoint(path, weights)
    _check_holds(checkpoint, "emu")
    config = emu.EmuConfig.from_dict(checkpoint.config.model)
    chosen = checkpoint.tokenizer if tokenizer is None else _read_tokenizer(tokenizer, config)
    if chosen is None and require_tokenizer:
        raise UserError(f"{path}: holds no tokenizer; give tokenizer=…, LLaMA's SentencePiece .model")
    items = {"params": emu.abstract(config), "statistics": jax.eval_shape(lambda: emu.initial_statistics(config))}
    adapters = {name: leaf for name, leaf in checkpoint.leaves.items() if name.startswith("lora/")}
    items |= nest({name: jax.ShapeDtypeStruct(*leaf) for name, leaf in adapters.items()})
    if mesh is not None:
        shardings = jax.tree.map(lambda _: replicated(mesh), items)
        shardings["params"] = tree_shardings(mesh, emu.logical_axes(config), items["params"])
        items = jax.tree.map(lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), items, shardings)
    items = _load_items(checkpoint, "emu", items)
    params = items["params"]
    if "lora" in items:
        params = lora.merge(params, items["lora"], checkpoint.source["lora"]["alpha"])
    return LoadedEmu(config, params, items["statistics"], chosen, checkpoint.source)


def _read_tokenizer(path: Path | str, config: emu.EmuConfig) -> Tokenizer:
    """The tokenizer in a file, with [USER] and [ASSISTANT] if the weights have rows for them."""
    instruct = Tokenizer.load(path, instruct=True)
    return instruct if config.llama.vocab_size == instruct.vocab_size else Tokenizer.load(path)


# ------------------------------------------------------------------------------------- parts of a visual decoder


@dataclasses.dataclass(frozen=True)
class LoadedUNet:
    """A U-Net's weights.

    Attributes:
      schedule: the noise schedule that the U-Net was trained with.
      latent_size: height and width of the latents in training.
      queries: embeddings per image in training, if that is known.
    """

    config: unet.UNetConfig
    params: unet.Params
    schedule: Schedule
    latent_size: int
    queries: int | None

    @classmethod
    def _read(cls, path: Path, weights: str) -> LoadedUNet:
        if is_checkpoint(path):
            checkpoint = open_checkpoint(path, weights)
            _check_holds(checkpoint, "unet")
            fields = checkpoint.config.to_dict()
            config = unet.UNetConfig.from_dict(fields["unet"])
            params = _load_items(checkpoint, "unet", {"params": {"unet": unet.abstract(config)}})["params"]["unet"]
        else:
            conversion = diffusers.unet_conversion(_local(path))
            fields = conversion.config
            config = unet.UNetConfig.from_dict(fields["unet"])
            params = jax.tree.map(jnp.asarray, gather(conversion)["params"]["unet"])
        schedule = Schedule.from_dict(fields["schedule"])
        return cls(config, params, schedule, fields["latent_size"], fields["queries"] or None)


@dataclasses.dataclass(frozen=True)
class LoadedVAE:
    """A VAE's weights.

    Attributes:
      config: with the scale that gives latents variance 1.
      image_size: height and width of the images in training, if that is known.
    """

    config: vae.VAEConfig
    params: vae.Params
    image_size: int | None

    @classmethod
    def _read(cls, path: Path, weights: str) -> LoadedVAE:
        if not is_checkpoint(path):
            conversion = diffusers.vae_conversion(_local(path))
            params = jax.tree.map(jnp.asarray, gather(conversion)["params"]["vae"])
            return cls(vae.VAEConfig.from_dict(conversion.config["vae"]), params, None)
        checkpoint = open_checkpoint(path, weights)
        _check_holds(checkpoint, "vae")
        config = vae.VAEConfig.from_dict(checkpoint.config.vae)
        items: dict[str, Any] = {"params": {"vae": vae.abstract(config)}}
        if "statistics/latent_square" in checkpoint.leaves:  # a run's, not a conversion's
            items["statistics"] = {"latent_square": jax.ShapeDtypeStruct((), jnp.float32)}
        items = _load_items(checkpoint, "vae", items)
        if "statistics" in items:
            config = dataclasses.replace(config, scale=float(items["statistics"]["latent_square"]) ** -0.5)
        return cls(config, items["params"]["vae"], checkpoint.config.get("image_size", 0) or None)


@dataclasses.dataclass(frozen=True)
class LoadedSafetyChecker:
    """A safety checker's weights."""

    config: clip.ClipConfig
    params: clip.Params

    @classmethod
    def _read(cls, path: Path, weights: str) -> LoadedSafetyChecker:
        with _downloaded(path) as folder:  # converted models keep it as it was published
            conversion = diffusers.safety_checker_conversion(folder)
            params = jax.tree.map(jnp.asarray, gather(conversion)["params"]["safety_checker"])
        return cls(clip.ClipConfig(**conversion.config["safety_checker"]), params)


@contextlib.contextmanager
def _downloaded(path: Path) -> Iterator[pathlib.Path]:
    """A folder, or for one in a bucket a copy on a local disk."""
    if not is_bucket(path):
        yield pathlib.Path(path)
        return
    with tempfile.TemporaryDirectory(prefix="emu-jax-") as folder:
        copy_folder(path, pathlib.Path(folder))
        yield pathlib.Path(folder)


Part = TypeVar("Part", LoadedUNet, LoadedVAE, LoadedSafetyChecker)


def load_part(path: Path, part: type[Part], weights: str = "auto") -> Part:
    """Loads a part of the visual decoder onto the first device.

    Args:
      path: a work directory, a checkpoint, or a diffusers folder (float32). A diffusers U-Net has its schedule in the
        folder `scheduler` beside it.
      part: LoadedUNet, LoadedVAE or LoadedSafetyChecker; the last only from a diffusers folder.
      weights: one of `store.WEIGHTS`, for work directories and checkpoints.

    Raises:
      UserError: the part is not there, or is damaged; lists everything that does not fit.
    """
    return part._read(path, weights)


# -------------------------------------------------------------------------------------------- our checkpoints


def load_leaves(checkpoint: Checkpoint, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Loads leaves by name, with the shardings of `wanted` (those without one: on the first device).

    Parameters with an EMA are read from it unless the checkpoint was opened for raw weights.

    Raises:
      UserError: a leaf is absent, has another shape or dtype, or is damaged.
    """
    found = {name: leaf for name, leaf in checkpoint.leaves.items() if name in wanted}
    check_leaves(checkpoint.folder, found, nest(wanted))
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    stored_as = {name: checkpoint.ema.get(name, name) for name in wanted}
    stored: dict[str, jax.ShapeDtypeStruct] = {}
    for name, leaf in wanted.items():
        dtype = jnp.dtype(checkpoint.stored_dtype(stored_as[name]))
        stored[stored_as[name]] = jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding or device)
    with arrays.errors_of(checkpoint.folder):
        values = arrays.read(arrays.StoredArrays(checkpoint.folder), stored)
    check_digests(checkpoint.folder, checkpoint.meta, values)
    return {name: _cast(values[stored_as[name]], leaf.dtype) for name, leaf in wanted.items()}


def _cast(value: jax.Array, dtype: Any) -> jax.Array:
    """The array in another dtype: by NumPy on the host, where a program for every shape would be compiled."""
    if value.dtype == dtype or not on_host(value):
        return value.astype(dtype)
    return jax.device_put(np.asarray(value).astype(dtype), value.sharding)


def _load_items(checkpoint: Checkpoint, part: str, items: Mapping[str, Any]) -> dict[str, Any]:
    """Whole items of a part; UserError unless their leaves are exactly those of the checkpoint."""
    check_leaves(checkpoint.folder, {n: x for n, x in checkpoint.leaves.items() if _part(checkpoint, n) == part}, items)
    return nest(load_leaves(checkpoint, flatten(items)))


def _part(checkpoint: Checkpoint, leaf: str) -> str:
    """What a leaf is of: what the checkpoint holds, or a part of the visual decoder that was trained with an Emu."""
    found = re.match("params/(unet|vae)/", leaf)
    return found[1] if found else checkpoint.holds


def has_decoder(path: Path) -> bool:
    """Whether a checkpoint holds a U-Net and a VAE beside its Emu, as those of the objective end_to_end do."""
    if not is_checkpoint(path):
        return False
    checkpoint = open_checkpoint(path)
    return {"emu", "unet", "vae"} <= {_part(checkpoint, name) for name in checkpoint.leaves}


def _check_holds(checkpoint: Checkpoint, expected: str) -> None:
    holds = checkpoint.holds
    if expected not in {holds, *(_part(checkpoint, name) for name in checkpoint.leaves)}:
        hint = f"; training can begin from it, by config.init.{holds}" if holds in emu.PARTS else ""
        raise UserError(f"{checkpoint.path}: holds {holds}; expected {expected}{hint}")
