"""The safety checker: drawn images -> which of them are flagged."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from emu_jax.checkpoints.load import LoadedSafetyChecker
from emu_jax.models import clip
from emu_jax.models.emu import CLIP_MEAN, CLIP_STD


class SafetyCheck:
    """A safety checker with its weights."""

    def __init__(self, loaded: LoadedSafetyChecker):
        self.config, self.params = loaded.config, loaded.params

    def flagged(self, images: Sequence[np.ndarray]) -> list[bool]:
        """Images uint8 [H, W, 3] -> whether each is close to one of the checker's concepts."""
        pixels = np.stack([preprocess(image, self.config.image_size) for image in images])  # [N, S, S, 3]
        return np.asarray(clip.flagged(self.params, pixels, config=self.config)).tolist()


def preprocess(image: np.ndarray, size: int) -> np.ndarray:
    """uint8 [H, W, 3] -> float32 [size, size, 3]: resizes the shortest side to `size`, crops the centre, normalises."""
    height, width = image.shape[:2]
    short = min(height, width)
    scaled = Image.fromarray(image).resize((size * width // short, size * height // short), Image.Resampling.BICUBIC)
    left, top = (scaled.width - size) // 2, (scaled.height - size) // 2
    pixels = np.asarray(scaled.crop((left, top, left + size, top + size)), np.float32) / 255.0
    return (pixels - np.array(CLIP_MEAN, np.float32)) / np.array(CLIP_STD, np.float32)
