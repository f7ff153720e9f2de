"""Published weights of any kind that is known here -> checkpoints of ours: `emu-jax convert --from … --to …`.

What a path holds is seen from its files:

    multimodal_encoder/ (+ unet, vae, scheduler, safety_checker)   the published Emu            -> a model that draws
    Emu-instruct.pt, or a file with its keys                       Emu-I, LoRA kept or merged   -> a model
    unet + vae                                                     Stable Diffusion 1.5         -> a visual decoder
    config.json + shards, or params.json + consolidated.*.pth      LLaMA                        -> config.init.llama
    a file with visual.* and no language model                     EVA-CLIP-g                   -> config.init.vision

All keys of all parts are accounted for before the first byte is written.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from emu_jax.checkpoints.convert import diffusers, emu, eva_clip, llama, stream
from emu_jax.checkpoints.convert.plan import Plan, check_dtype
from emu_jax.checkpoints.convert.tensor_files import SUFFIXES, TensorFile, Tensors
from emu_jax.checkpoints.layout import SAFETY_CHECKER, SCHEDULER, UNET, VAE
from emu_jax.data.tokenizer import Tokenizer
from emu_jax.errors import UserError
from emu_jax.models import emu as model

EXPECTED = (
    "the published Emu's folder, Emu-instruct.pt, a LLaMA folder (Hugging Face's or Meta's), EVA-CLIP's file, or a "
    "diffusers folder with unet and vae"
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What files do not say, and how parameters are to be stored; as `emu-jax convert` takes them."""

    dtype: str = "float32"
    int8: bool = False
    merge_lora: bool = False
    lora_alpha: float = emu.LORA_ALPHA
    vision_head_dim: int = emu.VISION_HEAD_DIM
    llama_head_dim: int = emu.LLAMA_HEAD_DIM
    tokenizer: Path | None = None


Write = Callable[..., stream.Summary]  # `stream.write` of a plan


def convert(source: Path, folder: Path, settings: Settings) -> dict[str, stream.Summary]:
    """Converts `source` into the new `folder`; what was done, by part.

    Raises:
      UserError: nothing known there, or it does not fit; nothing is left behind.
    """
    check_dtype(settings.dtype)
    if folder.exists():
        raise UserError(f"--to {folder}: it exists; name a new folder, or remove it")
    if not source.exists():
        raise UserError(f"--from {source}: no such file or folder; expected {EXPECTED}")
    main, parts, copies = _plan(source, settings)
    waiting = folder.with_name(folder.name + ".parts")  # what is finished before the folder that it belongs in
    done, beside = {}, {}
    try:
        for name, write in parts.items():
            beside[name] = waiting / name
            done[name] = write(beside[name], waiting=True)
        for name, origin in copies.items():
            beside[name] = waiting / name
            _copy(origin, beside[name])
        if main is not None:
            done["model"] = main(folder, beside)
        else:
            waiting.replace(folder)
    except UserError:
        shutil.rmtree(waiting, ignore_errors=True)
        raise
    shutil.rmtree(waiting, ignore_errors=True)
    return done


def _plan(source: Path, settings: Settings) -> tuple[Write | None, dict[str, Write], dict[str, Path]]:
    """What makes the folder itself, the folders in it, and what is copied there as it is."""
    root = source / "pretrain" if (source / "pretrain" / "multimodal_encoder").is_dir() else source
    parts: dict[str, Write] = {}
    copies: dict[str, Path] = {}
    if root.is_dir() and (root / UNET).is_dir() and (root / VAE).is_dir():
        schedule = diffusers.load_schedule(root / SCHEDULER)
        parts[UNET] = _writer(diffusers.plan_unet(root / UNET, schedule), dtype=settings.dtype)
        parts[VAE] = _writer(diffusers.plan_vae(root / VAE), dtype=settings.dtype)
        if (root / SAFETY_CHECKER).is_dir():
            diffusers.load_safety_checker(root / SAFETY_CHECKER)  # refuses what does not fit
            copies[SAFETY_CHECKER] = root / SAFETY_CHECKER
    if root.is_dir() and not (root / "multimodal_encoder").is_dir():
        if parts:
            _refuse_int8(source, settings)
            return None, parts, copies
        if not llama.is_llama(root):
            raise UserError(f"--from {source}: holds nothing known; expected {EXPECTED}")
        _refuse_int8(source, settings)
        work = llama.plan(root)
        own = root / llama.TOKENIZER
        path = settings.tokenizer or (own if own.is_file() else None)
        tokenizer = Tokenizer.load(path) if path else None
        return _writer(work, dtype=settings.dtype, tokenizer=tokenizer), {}, {}
    file = emu.find_weights(root)
    if file.suffix not in SUFFIXES:
        raise UserError(f"--from {source}: not a known kind of weights file; expected {EXPECTED}")
    tensors = TensorFile(file)
    if eva_clip.is_eva_clip(tensors):
        _refuse_int8(source, settings)
        return _writer(eva_clip.plan(tensors, vision_head_dim=settings.vision_head_dim), dtype=settings.dtype), {}, {}
    return _emu(tensors, settings), parts, copies


def _refuse_int8(source: Path, settings: Settings) -> None:
    if settings.int8:
        raise UserError(f"--int8: {source} is a part to begin training with; only a whole Emu is stored in int8")


def _emu(tensors: Tensors, settings: Settings) -> Write:
    work = emu.plan(
        tensors,
        vision_head_dim=settings.vision_head_dim,
        llama_head_dim=settings.llama_head_dim,
        lora_alpha=settings.lora_alpha,
        merge_lora=settings.merge_lora,
        keep_unused=True,
    )
    if settings.int8 and any(leaf.startswith("lora/") for leaf in work.shapes):
        raise UserError(f"--int8: {tensors.path} holds LoRA, which cannot stay apart from int8; add --merge-lora")
    config = model.EmuConfig.from_dict(work.config["model"])
    tokenizer = None
    if settings.tokenizer is not None:
        base = Tokenizer.load(settings.tokenizer)
        instruct = config.llama.vocab_size == Tokenizer.load(settings.tokenizer, instruct=True).vocab_size
        tokenizer = Tokenizer.load(settings.tokenizer, instruct=instruct)
        if tokenizer.vocab_size != config.llama.vocab_size:
            raise UserError(
                f"--tokenizer {settings.tokenizer}: {base.vocab_size} tokens, or 2 more, but the weights have "
                f"{config.llama.vocab_size}; name the tokenizer that belongs to them"
            )
    statistics = jax.tree.map(np.asarray, model.initial_statistics(config))
    constants = {f"statistics/{name}": value for name, value in statistics.items()}
    return _writer(work, dtype=settings.dtype, int8=settings.int8, tokenizer=tokenizer, constants=constants)


def _writer(plan: Plan, **settings: Any) -> Write:
    return functools.partial(stream.write, plan, **settings)


def _copy(origin: Path, target: Path) -> None:
    """A folder as it is, under its name once it is whole."""
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(origin, partial)
    os.replace(partial, target)
