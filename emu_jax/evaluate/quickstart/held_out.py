"""Scores of held-out images while a model learns: rows of metrics, a sheet of images, and a line at the terminal."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
from tqdm import tqdm

from emu_jax.data.fluent_emoji import examples
from emu_jax.data.tokenizer import Tokenizer
from emu_jax.evaluate.image_grid import RIGHT, WRONG, sheet
from emu_jax.evaluate.quickstart.captions import CAPTION_TOKENS, in_batches, squared_distances
from emu_jax.generate.model import Emu
from emu_jax.models import emu
from emu_jax.observation import Observation

SPLIT = "heldout_combinations"
SHOWN = 24  # images on a sheet
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

    def __call__(self, step: int, params: emu.Params, statistics: emu.Statistics) -> Observation:
        """The shares of captions that are exactly right, and of names whose own image is the closest of the sample.

        The first images are shown with their captions, right ones in green. The histogram has for every name the rank
        of its own image, 0 for the closest.
        """
        model = Emu(self.config, params, statistics, self.tokenizer)
        written = in_batches(
            lambda some: model.generate_text([[e.pixels] for e in some], max_new_tokens=CAPTION_TOKENS),
            self.pool,
            "",
        )
        captions = [one.text.strip() for one in written]
        right = np.array([caption == e.caption for caption, e in zip(captions, self.pool, strict=True)])
        images = np.stack(
            in_batches(lambda some: model.encode_images(np.stack([e.pixels for e in some])), self.pool, "")
        )  # [n, Q, D]
        generated = np.stack(
            in_batches(lambda some: model.generate_embeddings([[e.caption] for e in some]), self.pool, "")
        )  # [n, Q, D]
        distances = squared_distances(generated, images)  # [n, n]
        ranks = (distances < distances.diagonal()[:, None]).sum(1)
        scores = {CAPTION: float(right.mean()), CLOSEST: float((ranks == 0).mean())}
        tqdm.write(
            f"step {step}: {scores[CAPTION]:.0%} of {SAMPLE} held-out images are named exactly right, and "
            f"{scores[CLOSEST]:.0%} of the names lead to their own image"
        )
        shown = sheet(
            [e.pixels for e in self.pool[:SHOWN]],
            [caption or "(nothing)" for caption in captions[:SHOWN]],
            columns=6,
            colours=[RIGHT if good else WRONG for good in right[:SHOWN]],
        )
        return Observation(scores, {"held_out_captions": np.asarray(shown)}, {"held_out_ranks": ranks.astype(float)})
