"""The safety checker at work: drawn images uint8 [N, H, W, 3] -> which of them are flagged."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from emu_jax.models import clip

# What CLIP was trained with.
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclasses.dataclass(frozen=True)
class SafetyCheck:
    """A loaded safety checker."""

    config: clip.ClipConfig
    params: clip.Params

    @classmethod
    def load(cls, folder: Path) -> SafetyCheck:
        """Reads a diffusers `safety_checker` folder; UserError where it does not fit."""
        from emu_jax.checkpoints.convert.diffusers import load_safety_checker

        config, params = load_safety_checker(folder)
        return cls(config, jax.tree.map(jnp.asarray, params))

    def flagged(self, images: Sequence[np.ndarray]) -> list[bool]:
        """Images uint8 [H, W, 3] -> whether each is close to a concept that the checker was told to refuse."""
        pixels = np.stack([preprocess(image, self.config.image_size) for image in images])  # [N, S, S, 3]
        return np.asarray(clip.flagged(self.params, pixels, config=self.config)).tolist()


def preprocess(image: np.ndarray, size: int) -> np.ndarray:
    """uint8 [H, W, 3] -> float32 [size, size, 3]: shortest side to `size` (bicubic), centre, CLIP's mean and spread."""
    height, width = image.shape[:2]
    short = min(height, width)
    scaled = Image.fromarray(image).resize((size * width // short, size * height // short), Image.Resampling.BICUBIC)
    left, top = (scaled.width - size) // 2, (scaled.height - size) // 2
    pixels = np.asarray(scaled.crop((left, top, left + size, top + size)), np.float32) / 255.0
    return (pixels - np.array(MEAN, np.float32)) / np.array(STD, np.float32)
