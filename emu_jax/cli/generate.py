"""`emu-jax generate`."""

from __future__ import annotations

import argparse
import os
import pathlib
from collections.abc import Sequence

from emu_jax.cli.options import (
    add_decoding,
    add_model,
    add_sampling,
    check_parent,
    decoding,
    model,
    path,
    use_users_cache,
)
from emu_jax.errors import UserError
from emu_jax.storage import SCHEMES, Path, write_atomically

ABOUT = "Continue prompts that mix text and images: with text, embeddings, or the next image."
EXAMPLE = "emu-jax generate --model runs/quickstart --prompt cat.png tiger.png --out blend.png --seeds 0 1 2"
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".jp2", ".ppm"}
BUCKETS = tuple(f"{scheme}://" for scheme in SCHEMES)


def prompt_part(word: str) -> str | Path:
    """A text, or an image's path: neither an existing file nor a mistyped name of one must be captioned as text."""
    is_file = word.startswith(BUCKETS) or os.path.isfile(word)
    return path(word) if is_file or pathlib.Path(word).suffix.lower() in IMAGE_SUFFIXES else word


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", nargs="+", type=prompt_part, help="texts and image files, in order")
    prompts.add_argument("--prompts", type=path, metavar="FILE.jsonl", help="many images to draw (generate/files.py)")
    parser.add_argument("--out", type=path, metavar="OUT.png", help="draw the next image into this file")
    parser.add_argument("--decoder", type=model, help="folder with unet and vae (default: the model's own)")
    parser.add_argument("--no-safety-checker", action="store_true", help="do not use the decoder's safety checker")
    add_sampling(parser, guidance=7.5, guidance_help="guidance scale")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="draw one image for each seed")
    parser.add_argument("--height", type=int, help="in pixels (default: the decoder's)")
    parser.add_argument("--width", type=int, help="in pixels (default: the decoder's)")
    parser.add_argument("--batch", type=int, default=8, help="images drawn at a time")
    parser.add_argument("--embeddings", type=path, metavar="OUT.npy", help="write the next image's embeddings [Q, D]")
    parser.add_argument("--max-new-tokens", type=int, default=20, help="longest text, in tokens")
    add_decoding(parser)


def run(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    import numpy as np

    from emu_jax.generate.files import draw_files, read_requests, with_seeds
    from emu_jax.generate.model import Emu

    out = options.embeddings
    if out is not None and out.exists():
        raise UserError(f"--embeddings {out}: the file exists; name a new one")
    check_parent("--embeddings", out)
    if options.batch < 1:
        raise UserError(f"--batch {options.batch}; expected at least 1")
    requests = read_requests(options.prompts) if options.prompts else []
    if options.out is not None:
        requests = with_seeds(options.prompt, options.seeds, options.out)
    use_users_cache()
    emu = Emu.load(
        options.model,
        tokenizer=options.tokenizer,
        vision_head_dim=options.vision_head_dim,
        weights=options.weights,
        decoder=options.decoder,
        safety_checker=not options.no_safety_checker,
    )
    if requests:
        settings = {name: getattr(options, name) for name in ("sampler", "steps", "guidance", "height", "width")}
        for file in draw_files(emu, requests, batch=options.batch, settings=settings):
            print(file)
        return 0
    if out is not None:
        with write_atomically(out) as partial, partial.open("wb") as file:
            np.save(file, emu.generate_embeddings([options.prompt], seeds=options.seeds[:1])[0])
        print(out)
        return 0
    settings = decoding(options) | {"max_new_tokens": options.max_new_tokens, "seed": options.seeds[0]}
    print(emu.generate_text([options.prompt], **settings)[0].text)
    return 0
