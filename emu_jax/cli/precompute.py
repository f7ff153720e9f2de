"""`emu-jax precompute`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from emu_jax.cli.options import add_model, model, part, path

ABOUT = "Compute once what the decoder trains on: embeddings of texts, latents of images."
EXAMPLE = "emu-jax precompute --model runs/quickstart --vae runs/quickstart/vae --out runs/quickstart/latents"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument(
        "--vae", type=model, required=True, help="work directory of configs/vae.py, a diffusers folder, or emu-mini/vae"
    )
    parser.add_argument(
        "--out", type=path, required=True, help="a new folder, or one that the same command has begun to fill"
    )
    parser.add_argument("--source", default="fluent_emoji", help="like config.data.source")
    parser.add_argument("--split", default="train", help="like config.data.split")
    parser.add_argument(
        "--image-size", type=int, default=0, help="side of the images in pixels (default: the VAE's in training)"
    )
    parser.add_argument(
        "--fit", default="crop", help="how images become square: crop, pad (on white) or squash (default: crop)"
    )
    parser.add_argument(
        "--min-side", type=int, default=0, help="leave out images with a shorter side, in pixels, as they are stored"
    )
    parser.add_argument("--dtype", default="float32", help="of the stored arrays: float32 or bfloat16")
    parser.add_argument(
        "--without-encoded",
        dest="encoded",
        action="store_false",
        help="leave out the images' own embeddings, which config.loss.encoded_share=0 does not read",
    )
    parser.add_argument(
        "--max-faults", type=float, default=0.0, help="stop where a larger share of images cannot be read"
    )
    parser.add_argument("--part", default="0/1", metavar="I/N", help="process I of N; together they fill one --out")


def run(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    from emu_jax.generate.precompute import PrecomputeConfig, precompute

    fields = ("source", "split", "image_size", "fit", "min_side", "dtype", "encoded", "max_faults")
    drawn = PrecomputeConfig(**{name: getattr(options, name) for name in fields})
    loading = {name: getattr(options, name) for name in ("tokenizer", "vision_head_dim", "weights")}
    count = precompute(options.model, options.vae, options.out, drawn, part=part(options.part), **loading)
    if count is None:
        print(f"{options.out}: this part is written; the process that finishes last completes the folder")
    else:
        print(f"{options.out}: {count} examples")
    return 0
