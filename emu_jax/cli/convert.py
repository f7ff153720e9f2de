"""`emu-jax convert`."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence

from emu_jax.cli.options import path

ABOUT = "Convert published weights to a checkpoint: Emu, Emu-I, LLaMA, EVA-CLIP or Stable Diffusion."
EXAMPLE = "emu-jax convert --from Emu/pretrain --to weights/emu --tokenizer llama_tokenizer.model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--from", dest="source", required=True, type=path, help="published file or folder, local")
    parser.add_argument(
        "--to", dest="folder", required=True, type=path, help="a new folder; the same command resumes a killed run"
    )
    parser.add_argument("--dtype", default="float32", help="dtype of the parameters: float32 or bfloat16")
    parser.add_argument("--quantise", default="", metavar="KIND", help="store the LLM's kernels as int8 or int4")
    parser.add_argument("--merge-lora", action="store_true", help="add Emu-I's LoRA to its weights")
    parser.add_argument("--lora-alpha", type=float, default=16.0, help="not in the files (default: 16)")
    parser.add_argument("--vision-head-dim", type=int, default=88, help="not in the shapes (default: 88)")
    parser.add_argument("--llama-head-dim", type=int, default=128, help="if no file states it (default: 128)")
    parser.add_argument("--tokenizer", type=path, help="SentencePiece .model to keep with the weights")


def run(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    from emu_jax.checkpoints.convert.formats import Settings, convert

    names = [field.name for field in dataclasses.fields(Settings)]
    settings = Settings(**{name: getattr(options, name) for name in names})
    for part, summary in convert(options.source, options.folder, settings).items():
        print(f"{part}: {summary}")
    print(options.folder)
    return 0
