"""`emu-jax export`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from emu_jax.cli.options import add_weights, path

ABOUT = "Export a checkpoint to the formats of other programs."
EXAMPLE = "emu-jax export --from runs/quickstart --to exported --format diffusers"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--from", dest="source", required=True, type=path, help="work directory or checkpoint")
    parser.add_argument("--to", dest="folder", required=True, type=path, help="a new folder")
    parser.add_argument("--format", required=True, help="emu, llama, llama-base, diffusers, peft or packed")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16 (default: as converted, or as in the checkpoint)")
    parser.add_argument("--merge-lora", action="store_true", help="add LoRA to the weights")
    add_weights(parser)


def run(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    from emu_jax.checkpoints.convert.export import export

    settings = {"dtype": options.dtype, "merge_lora": options.merge_lora, "weights": options.weights}
    for file in export(options.source, options.folder, options.format, **settings):
        print(file)
    return 0
