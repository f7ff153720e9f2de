"""Scores of held-out images while a model learns: rows of the run's metrics, and a line at the terminal."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
from tqdm import tqdm

from emu_jax.data.fluent_emoji import examples
from emu_jax.data.tokenizer import Tokenizer
from emu_jax.evaluate.quickstart.captions import CAPTION_TOKENS, in_batches, squared_distances
from emu_jax.generate.model import Emu
from emu_jax.models import emu

SPLIT = "heldout_combinations"
SAMPLE = 64  # every second image of the split; the report scores all of them
CAPTION, CLOSEST = "held_out_captions_right", "held_out_images_closest"


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Scores a sample of the held-out images.

    Args:
      config: the model's.
    """

    config: emu.EmuConfig
    tokenizer: Tokenizer

    @functools.cached_property
    def pool(self) -> list:
        found = examples(SPLIT, self.config.vision.image_size)
        return [found[i * len(found) // SAMPLE] for i in range(SAMPLE)]

    def __call__(self, step: int, params: emu.Params, statistics: emu.Statistics) -> dict[str, float]:
        """The shares of captions that are exactly right, and of names whose own image is the closest of the sample."""
        model = Emu(self.config, params, statistics, self.tokenizer)
        written = in_batches(
            lambda some: model.generate_text([[e.pixels] for e in some], max_new_tokens=CAPTION_TOKENS),
            self.pool,
            "",
        )
        right = np.mean([one.text.strip() == e.caption for one, e in zip(written, self.pool, strict=True)])
        images = np.stack(
            in_batches(lambda some: model.encode_images(np.stack([e.pixels for e in some])), self.pool, "")
        )  # [n, Q, D]
        generated = np.stack(
            in_batches(lambda some: model.generate_embeddings([[e.caption] for e in some]), self.pool, "")
        )  # [n, Q, D]
        closest = squared_distances(generated, images).argmin(1)  # [n]
        scores = {CAPTION: float(right), CLOSEST: float(np.mean(closest == np.arange(len(closest))))}
        tqdm.write(
            f"step {step}: {scores[CAPTION]:.0%} of {SAMPLE} held-out images are named exactly right, and "
            f"{scores[CLOSEST]:.0%} of the names lead to their own image"
        )
        return scores
