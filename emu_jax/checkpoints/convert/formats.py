"""Published weights in any known format -> our checkpoints.

The format is recognised from the files:

    multimodal_encoder/ (+ unet, vae, scheduler, safety_checker)   the published Emu            -> a model that draws
    Emu-instruct.pt, or a file with its keys                       Emu-I, LoRA kept or merged   -> a model
    unet + vae                                                     Stable Diffusion 1.5         -> a visual decoder
    config.json + shards, or params.json + consolidated.*.pth      LLaMA                        -> config.init.llama
    a file with visual.* and no language model                     EVA-CLIP-g                   -> config.init.vision

Every key of every part is accounted for before the first byte is written.
"""

from __future__ import annotations

import dataclasses
import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from emu_jax.checkpoints.convert import diffusers, emu, eva_clip, llama, stream
from emu_jax.checkpoints.convert.conversion import Conversion, check_dtype, gather
from emu_jax.checkpoints.convert.tensor_files import SUFFIXES, TensorFile, Tensors
from emu_jax.checkpoints.layout import SAFETY_CHECKER, UNET, VAE
from emu_jax.data.tokenizer import Tokenizer
from emu_jax.errors import UserError
from emu_jax.models.emu import EmuConfig, initial_statistics
from emu_jax.storage import remove, write_atomically

EXPECTED = (
    "the published Emu's folder, Emu-instruct.pt, a LLaMA folder (Hugging Face's or Meta's), EVA-CLIP's file, or a "
    "diffusers folder with unet and vae"
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of a conversion.

    Attributes:
      dtype: dtype of parameters, float32 or bfloat16.
      int8: store the language model's kernels in int8. merge_lora: add adapters to their weights.
      lora_alpha, vision_head_dim, llama_head_dim: not in the files; the defaults are the published models'.
      tokenizer: LLaMA's SentencePiece .model, stored with the weights.
    """

    dtype: str = "float32"
    int8: bool = False
    merge_lora: bool = False
    lora_alpha: float = emu.LORA_ALPHA
    vision_head_dim: int = emu.VISION_HEAD_DIM
    llama_head_dim: int = emu.LLAMA_HEAD_DIM
    tokenizer: Path | None = None


Write = Callable[..., stream.Summary]  # `stream.write` of one conversion


def convert(source: Path, folder: Path, settings: Settings) -> dict[str, stream.Summary]:
    """Converts `source` to the new `folder`; returns figures by part.

    Raises:
      UserError: the source is in no known format, or does not fit it; nothing is left behind.
    """
    check_dtype(settings.dtype)
    if folder.exists():
        raise UserError(f"{folder}: it exists; name a new folder, or remove it")
    if not source.exists():
        raise UserError(f"{source}: no such file or folder; expected {EXPECTED}")
    main, parts, copies = _plan(source, settings)
    waiting = folder.with_name(folder.name + ".parts")  # finished parts, until the folder that they belong in is
    done, beside = {}, {}
    try:
        for name, write in parts.items():
            beside[name] = waiting / name
            done[name] = write(beside[name], waiting=True)
        for name, origin in copies.items():
            beside[name] = waiting / name
            remove(beside[name])
            with write_atomically(beside[name]) as partial:
                shutil.copytree(origin, partial)
        if main is not None:
            done["model"] = main(folder, beside)
        else:
            waiting.replace(folder)
    except UserError:
        remove(waiting)
        raise
    remove(waiting)
    return done


def _plan(source: Path, settings: Settings) -> tuple[Write | None, dict[str, Write], dict[str, Path]]:
    """Writes the folder itself (None: it has only parts), the parts in it, and the folders that are copied there."""
    root = source / "pretrain" if (source / "pretrain" / "multimodal_encoder").is_dir() else source
    parts: dict[str, Write] = {}
    copies: dict[str, Path] = {}
    if root.is_dir() and (root / UNET).is_dir() and (root / VAE).is_dir():
        parts[UNET] = _writer(diffusers.unet_conversion(root / UNET), dtype=settings.dtype)
        parts[VAE] = _writer(diffusers.vae_conversion(root / VAE), dtype=settings.dtype)
        if (root / SAFETY_CHECKER).is_dir():
            gather(diffusers.safety_checker_conversion(root / SAFETY_CHECKER))  # refuses files that cannot be used
            copies[SAFETY_CHECKER] = root / SAFETY_CHECKER
    if root.is_dir() and not (root / "multimodal_encoder").is_dir():
        if parts:
            _refuse_int8(source, settings)
            return None, parts, copies
        if not llama.is_llama(root):
            raise UserError(f"{source}: holds no known weights; expected {EXPECTED}")
        _refuse_int8(source, settings)
        conversion = llama.conversion(root)
        own = root / llama.TOKENIZER
        path = settings.tokenizer or (own if own.is_file() else None)
        tokenizer = Tokenizer.load(path) if path else None
        return _writer(conversion, dtype=settings.dtype, tokenizer=tokenizer), {}, {}
    file = emu.find_weights(root)
    if file.suffix not in SUFFIXES:
        raise UserError(f"{source}: not a known kind of weights file; expected {EXPECTED}")
    tensors = TensorFile(file)
    if eva_clip.is_eva_clip(tensors):
        _refuse_int8(source, settings)
        conversion = eva_clip.conversion(tensors, vision_head_dim=settings.vision_head_dim)
        return _writer(conversion, dtype=settings.dtype), {}, {}
    return _emu(tensors, settings), parts, copies


def _refuse_int8(source: Path, settings: Settings) -> None:
    if settings.int8:
        raise UserError(
            f"int8=True: {source} is a part to initialise training from; only a whole Emu is stored in int8"
        )


def _emu(tensors: Tensors, settings: Settings) -> Write:
    conversion = emu.conversion(
        tensors,
        vision_head_dim=settings.vision_head_dim,
        llama_head_dim=settings.llama_head_dim,
        lora_alpha=settings.lora_alpha,
        merge_lora=settings.merge_lora,
        keep_unused=True,
    )
    if settings.int8 and any(leaf.startswith("lora/") for leaf in conversion.shapes):
        raise UserError(f"int8=True: {tensors.path} holds LoRA, which cannot stay apart from int8; set merge_lora too")
    config = EmuConfig.from_dict(conversion.config["model"])
    tokenizer = None
    if settings.tokenizer is not None:
        base = Tokenizer.load(settings.tokenizer)
        instruct = config.llama.vocab_size == Tokenizer.load(settings.tokenizer, instruct=True).vocab_size
        tokenizer = Tokenizer.load(settings.tokenizer, instruct=instruct)
        if tokenizer.vocab_size != config.llama.vocab_size:
            raise UserError(
                f"tokenizer={settings.tokenizer}: {base.vocab_size} tokens, or 2 more, but the weights have "
                f"{config.llama.vocab_size}; name the tokenizer that belongs to them"
            )
    statistics = jax.tree.map(np.asarray, initial_statistics(config))
    constants = {f"statistics/{name}": value for name, value in statistics.items()}
    return _writer(conversion, dtype=settings.dtype, int8=settings.int8, tokenizer=tokenizer, constants=constants)


def _writer(conversion: Conversion, **settings: Any) -> Write:
    return functools.partial(stream.write, conversion, **settings)
