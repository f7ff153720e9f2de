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
import pathlib

import jax
import numpy as np

from emu_jax import storage
from emu_jax.checkpoints.convert import diffusers, emu, eva_clip, llama, stream
from emu_jax.checkpoints.convert.conversion import check_dtype, gather
from emu_jax.checkpoints.convert.tensor_files import SUFFIXES, TensorFile, Tensors
from emu_jax.checkpoints.layout import SAFETY_CHECKER, UNET, VAE
from emu_jax.checkpoints.streamed import check_new, resumable_folder
from emu_jax.data.tokenizer import Tokenizer
from emu_jax.errors import UserError
from emu_jax.models.emu import EmuConfig, initial_statistics
from emu_jax.models.quantise import KINDS

EXPECTED = (
    "the published Emu's folder, Emu-instruct.pt, a LLaMA folder (Hugging Face's or Meta's), EVA-CLIP's file, or a "
    "diffusers folder with unet and vae"
)
ADAPTERS = "adapter_config.json"  # of a folder of PEFT


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of a conversion.

    Attributes:
      dtype: dtype of parameters, float32 or bfloat16.
      quantise: "int8" or "int4" stores the language model's kernels as integers; "" does not.
      merge_lora: add adapters to their weights.
      lora_alpha, vision_head_dim, llama_head_dim: not in the files; the defaults are the published models'.
      tokenizer: LLaMA's SentencePiece .model, stored with the weights.
    """

    dtype: str = "float32"
    quantise: str = ""
    merge_lora: bool = False
    lora_alpha: float = emu.LORA_ALPHA
    vision_head_dim: int = emu.VISION_HEAD_DIM
    llama_head_dim: int = emu.LLAMA_HEAD_DIM
    tokenizer: storage.Path | None = None


def convert(source: storage.Path, folder: storage.Path, settings: Settings) -> dict[str, stream.Summary]:
    """Converts `source` to the new `folder`; returns figures by part.

    Args:
      source: on a local disk. folder: on a local disk or in a bucket.

    Raises:
      UserError: the source is in no known format, or does not fit it; nothing is left behind.
    """
    check_dtype(settings.dtype)
    if settings.quantise not in ("", *KINDS):
        raise UserError(f"quantise={settings.quantise!r}; expected one of {', '.join(KINDS)}")
    check_new(folder)
    source = storage.check_local(source, "a published file or folder, which is memory-mapped,")
    if not source.exists():
        raise UserError(f"{source}: no such file or folder; expected {EXPECTED}")
    jobs, copies = _recognise(source, settings)
    files = [file for origin in copies.values() for file in sorted(origin.rglob("*"))]
    stats = [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    whole = stream.fingerprint([[part, job.fingerprint] for part, job in jobs.items()] + stats)
    done = {}
    with resumable_folder(folder, whole) as place:
        for name, origin in copies.items():
            storage.copy_folder(origin, place / name)
        for part, job in jobs.items():
            done[part or "model"] = stream.write(job, place / part)
    return done


def _recognise(source: pathlib.Path, settings: Settings) -> tuple[dict[str, stream.Job], dict[str, pathlib.Path]]:
    """What is written to each part of the folder and, last, to the folder itself (""); and the folders to copy."""
    root = source / "pretrain" if (source / "pretrain" / "multimodal_encoder").is_dir() else source
    parts: dict[str, stream.Job] = {}
    copies: dict[str, pathlib.Path] = {}
    if root.is_dir() and (root / UNET).is_dir() and (root / VAE).is_dir():
        parts[UNET] = stream.plan(diffusers.unet_conversion(root / UNET), dtype=settings.dtype)
        parts[VAE] = stream.plan(diffusers.vae_conversion(root / VAE), dtype=settings.dtype)
        if (root / SAFETY_CHECKER).is_dir():
            gather(diffusers.safety_checker_conversion(root / SAFETY_CHECKER))  # refuses files that cannot be used
            copies[SAFETY_CHECKER] = root / SAFETY_CHECKER
    if root.is_dir() and not (root / "multimodal_encoder").is_dir():
        if parts:
            _refuse_integers(source, settings)
            return parts, copies
        if not llama.is_llama(root):
            if (root / ADAPTERS).is_file():
                raise UserError(
                    f"{source}: holds adapters of PEFT without the weights that they belong to; merge them there "
                    "(merge_and_unload, save_pretrained) and convert the result"
                )
            raise UserError(f"{source}: holds no known weights; expected {EXPECTED}")
        _refuse_integers(source, settings)
        conversion = llama.conversion(root)
        own = root / llama.TOKENIZER
        path = settings.tokenizer or (own if own.is_file() else None)
        tokenizer = Tokenizer.load(path) if path else None
        return {"": stream.plan(conversion, dtype=settings.dtype, tokenizer=tokenizer)}, {}
    file = emu.find_weights(root)
    if file.suffix not in SUFFIXES:
        raise UserError(f"{source}: not a known kind of weights file; expected {EXPECTED}")
    tensors = TensorFile(file)
    if eva_clip.is_eva_clip(tensors):
        _refuse_integers(source, settings)
        conversion = eva_clip.conversion(tensors, vision_head_dim=settings.vision_head_dim)
        return {"": stream.plan(conversion, dtype=settings.dtype)}, {}
    return parts | {"": _emu(tensors, settings)}, copies


def _refuse_integers(source: pathlib.Path, settings: Settings) -> None:
    if settings.quantise:
        raise UserError(
            f"quantise={settings.quantise}: {source} is a part to initialise training from; only a whole Emu is stored "
            "in integers"
        )


def _emu(tensors: Tensors, settings: Settings) -> stream.Job:
    conversion = emu.conversion(
        tensors,
        vision_head_dim=settings.vision_head_dim,
        llama_head_dim=settings.llama_head_dim,
        lora_alpha=settings.lora_alpha,
        merge_lora=settings.merge_lora,
        keep_unused=True,
    )
    if settings.quantise and any(leaf.startswith("lora/") for leaf in conversion.shapes):
        raise UserError(
            f"quantise={settings.quantise}: {tensors.path} holds LoRA, which cannot stay apart from integers; set "
            "merge_lora too"
        )
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
    return stream.plan(
        conversion, dtype=settings.dtype, quantised=settings.quantise, tokenizer=tokenizer, constants=constants
    )
