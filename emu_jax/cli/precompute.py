"""`emu-jax precompute`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from emu_jax.cli.options import add_model, model, path

ABOUT = "Compute once what the decoder trains on: embeddings of texts, latents of images."
EXAMPLE = "emu-jax precompute --model runs/quickstart --vae runs/quickstart/vae --out runs/quickstart/latents"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument(
        "--vae", type=model, required=True, help="work directory of configs/vae.py, a diffusers folder, or emu-mini/vae"
    )
    parser.add_argument("--out", type=path, required=True, help="a new folder")
    parser.add_argument("--source", default="fluent_emoji", help="like config.data.source")
    parser.add_argument("--split", default="train", help="like config.data.split")
    parser.add_argument("--image-size", type=int, help="side of the images in pixels (default: the VAE's in training)")


def run(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    from emu_jax.generate.precompute import precompute

    names = ("source", "split", "image_size", "tokenizer", "vision_head_dim", "weights")
    settings = {name: getattr(options, name) for name in names}
    count = precompute(options.model, options.vae, options.out, **settings)
    print(f"{options.out}: {count} examples")
    return 0
