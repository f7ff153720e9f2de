"""Held-out images of the embedded data set for the page's examples: no model trained on that set has seen them."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from PIL import Image as PIL

from emu_jax.data import fluent_emoji

NAMES = (
    "woman scientist: medium skin tone",
    "fairy: medium skin tone",
    "woman mage: light skin tone",
    "man construction worker: light skin tone",
    "ninja: light skin tone",
    "woman cook: light skin tone",
    "princess: dark skin tone",
    "detective: medium-dark skin tone",
    "waving hand: medium skin tone",
    "man singer: light skin tone",
    "woman vampire: dark skin tone",
)


@dataclasses.dataclass(frozen=True)
class Sample:
    """The file and the name of an image."""

    path: str
    name: str

    @property
    def thing(self) -> str:
        """The name without the skin tone: "fairy"."""
        return self.name.partition(":")[0]


def write_samples() -> list[Sample]:
    """Writes the images into the page's folder (GRADIO_TEMP_DIR) as PNG files."""
    folder = Path(os.environ["GRADIO_TEMP_DIR"]) / "examples"
    folder.mkdir(exist_ok=True)
    by_name = {example.caption: example for example in fluent_emoji.examples("heldout_combinations", fluent_emoji.SIZE)}
    samples = []
    for name in NAMES:
        path = folder / f"{name.replace(': ', '-').replace(' ', '-')}.png"
        PIL.fromarray(by_name[name].pixels).save(path)
        samples.append(Sample(str(path), name))
    return samples
