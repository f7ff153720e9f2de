"""A model on emoji of another style than it was trained on: `python -m tests.benchmarks.benchmark_style PACKAGE MODEL`.

In: a package of images as npm packs it, with Unicode's codes as file names:

    npm pack emoji-datasource-google@16.0.0     # Google's Noto Emoji, 64 x 64

Out: for the names of `heldout_combinations` and for as many of `train`, the share of images that the model names
exactly right, whose role and whose skin tone it names, with 95% intervals. The style it was trained on is beside it.
"""

from __future__ import annotations

import argparse
import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from emu_jax import Emu
from emu_jax.data.decoding import flatten
from emu_jax.data.embedded_chats import has_one_tone
from emu_jax.data.fluent_emoji import Example, canonical, examples, image_code, role_of
from emu_jax.data.images import resize
from emu_jax.evaluate.intervals import share

BATCH = 32


def drawn_otherwise(package: Path, size: int) -> dict[str, np.ndarray]:
    """Images by the code of the emoji: uint8 [size, size, 3], on white."""
    found = {}
    with tarfile.open(package) as archive:
        for member in archive:
            if member.name.endswith(".png") and "/64/" in member.name:
                file = archive.extractfile(member)
                assert file is not None
                found[canonical(Path(member.name).stem)] = resize(flatten(Image.open(io.BytesIO(file.read()))), size)
    return found


def row(about: str, emu: Emu, images: list[np.ndarray], wanted: list[Example]) -> str:
    said = []
    for first in range(0, len(images), BATCH):
        prompts = [[image] for image in images[first : first + BATCH]]
        said += [one.text.strip() for one in emu.generate_text(prompts)]
    pairs = list(zip(said, wanted, strict=True))
    toned = [(text, one) for text, one in pairs if has_one_tone(one)]
    figures = [
        share([text == one.caption for text, one in pairs]),
        share([role_of(text) == one.role for text, one in pairs]),
        share([text.endswith(f": {one.tone}") for text, one in toned]),
    ]
    cells = [f"{f.value:.2f} ({f.interval[0]:.2f} to {f.interval[1]:.2f})" for f in figures]
    return f"| {about} | {len(pairs)} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("package", type=Path)
    parser.add_argument("model")
    options = parser.parse_args()
    emu = Emu.load(options.model)
    size = emu.config.vision.image_size
    others = drawn_otherwise(options.package, size)
    print("| images | count | exactly right | role | skin tone |\n|---|---|---|---|---|")
    for split in ("heldout_combinations", "train"):
        known = [one for one in examples(split, size) if image_code(one.key) in others]
        known = [known[place] for place in np.random.default_rng(0).permutation(len(known))[:140]]
        print(row(f"{split}, own style", emu, [one.pixels for one in known], known))
        print(row(f"{split}, other style", emu, [others[image_code(one.key)] for one in known], known))


if __name__ == "__main__":
    main()
