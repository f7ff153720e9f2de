"""Images of people from the embedded emoji, what is known of them, and files that show them."""

from __future__ import annotations

import dataclasses
import functools
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as PIL

from emu_jax.data.fluent_emoji import SIZE, read_example, records
from tests.videos import write_video

HELD_OUT, TRAIN = "heldout_combinations", "train"
COUNTS = {HELD_OUT: 4, TRAIN: 9}  # images


@dataclasses.dataclass(frozen=True)
class Person:
    """One image and what is known of it."""

    pixels: np.ndarray  # uint8 [128, 128, 3]
    name: str  # "woman astronaut: medium skin tone"
    role: str  # "woman astronaut"
    tone: str  # "medium"

    @property
    def captions(self) -> list[str]:
        return [
            self.name,
            f"A {self.role} with {self.tone} skin tone.",
            f"An emoji of a {self.role}.",
            f"An image of a {self.role}",
            f"The {self.role} has {self.tone} skin tone.",
        ]


@functools.cache
def people(split: str) -> tuple[Person, ...]:
    """The first images of a split of the embedded set that show one person."""
    source = records(split)
    found: list[Person] = []
    for index in range(len(source)):
        example = read_example(source[index], SIZE)
        role, tone = example.role, example.tone
        if role.startswith(("woman ", "man ", "person ")) and tone.endswith(" skin tone") and "," not in tone:
            found.append(Person(example.pixels, example.caption, role, tone.removesuffix(" skin tone")))
        if len(found) == COUNTS[split]:
            break
    return tuple(found)


# ---------------------------------------------------------------- files


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def write_image(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.fromarray(pixels).save(path)


def write_moving_image(path: Path, pixels: np.ndarray, frames: int = 16) -> None:
    """The image moves from the left to the right."""
    side, width = 64, 96
    small = np.asarray(PIL.fromarray(pixels).resize((side, side)))
    shown = np.full((frames, side, width, 3), 255, np.uint8)
    for index, frame in enumerate(shown):
        left = (width - side) * index // (frames - 1)
        frame[:, left : left + side] = small
    write_video(path, shown)


def encoded(pixels: np.ndarray) -> bytes:
    """A PNG file."""
    file = io.BytesIO()
    PIL.fromarray(pixels).save(file, "PNG")
    return file.getvalue()
