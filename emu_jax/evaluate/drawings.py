"""Scores of a visual decoder on the embedded images: is the real image closest to a drawn one of the right kind?

In: a model with a decoder. Out: `Drawings`: figures with intervals and chance, and images for the report. Images
are drawn from held-out captions, and from held-out images' own embeddings (reconstruction); each is looked up among
all images by squared distance of pixels, and of VGG features.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from emu_jax.data.embedded_chats import has_one_tone
from emu_jax.data.fluent_emoji import SPLITS, Example, examples
from emu_jax.evaluate import vgg
from emu_jax.evaluate.intervals import Figure, share
from emu_jax.evaluate.pairs import in_batches, squared_distances
from emu_jax.generate.model import Emu, GeneratedImage, GeneratedText

log = logging.getLogger(__name__)

Features = Callable[[Sequence[np.ndarray]], np.ndarray]  # images uint8 [H, W, 3] -> [N, …]

SPLIT = "heldout_combinations"
VGG = "VGG"
SETTINGS: dict[str, Any] = {"sampler": "dpmpp", "steps": 20, "guidance": 4.0}
TOP = 5  # places in which the role may stand


@dataclasses.dataclass(frozen=True)
class Drawing:
    """One held-out image, drawn from its caption and from its own embeddings; uint8 [H, W, 3] each."""

    example: Example
    drawn: np.ndarray
    reconstructed: np.ndarray


@dataclasses.dataclass(frozen=True)
class Drawings:
    """`blends`: two real images and what is drawn from both; `continued`: an image and the reply to it."""

    figures: dict[str, Figure]
    drawings: list[Drawing]
    blends: list[tuple[Example, Example, np.ndarray]]
    continued: list[tuple[Example, list[GeneratedText | GeneratedImage]]]


def score(emu: Emu) -> Drawings:
    """Draws and scores the split of unseen combinations."""
    size = emu.check_drawing(**SETTINGS).size
    gallery = [example for split in SPLITS for example in examples(split, size)]
    pool = examples(SPLIT, size)
    seeds = {example.key: seed for seed, example in enumerate(pool)}

    def draw(part: Sequence[Example]) -> list[np.ndarray]:
        chosen = [seeds[e.key] for e in part]
        results = emu.generate_images([[e.caption] for e in part], seeds=chosen, **SETTINGS)
        return [np.asarray(result.image) for result in results]

    def reconstruct(part: Sequence[Example]) -> list[np.ndarray]:
        results = emu.reconstruct_images([e.pixels for e in part], seeds=[seeds[e.key] for e in part], **SETTINGS)
        return [np.asarray(result.image) for result in results]

    drawn, rebuilt = in_batches(draw, pool, "draw captions"), in_batches(reconstruct, pool, "reconstruct")
    figures: dict[str, Figure] = {}
    for space, features in feature_spaces().items():
        sets = {"gallery": [e.pixels for e in gallery], "drawn from the caption": drawn, "reconstructed": rebuilt}
        seen = {name: np.stack(in_batches(features, some, f"{space}: {name}")) for name, some in sets.items()}
        known = seen.pop("gallery")
        if space == VGG:
            seen = {name: vgg.equalised(some, known) for name, some in seen.items()}
            known = vgg.equalised(known, known)
        for name, some in seen.items():
            figures |= neighbour_figures(f"{SPLIT}: {name}", space, some, pool, gallery, known)
    toned = [e for e in pool if has_one_tone(e)]
    blends = [
        (a, b, np.asarray(emu.generate_image([a.pixels, b.pixels], **SETTINGS).image)) for a, b in _couples(toned)
    ]
    continued = [
        (e, emu.continue_document([e.pixels], pattern=("text", "image"), **SETTINGS))
        for e in _spread(toned, 3, offset=2)
    ]
    return Drawings(figures, [Drawing(*three) for three in zip(pool, drawn, rebuilt, strict=True)], blends, continued)


def feature_spaces() -> dict[str, Features]:
    """What images are compared by: their pixels, and VGG features where the weights are installed."""
    spaces: dict[str, Features] = {"pixels": lambda images: np.stack(images).astype(np.float32) / 255.0}
    file = vgg.find_weights()
    if file is None:
        log.warning("no VGG features: install emu-jax[eval] to compare images by them as well")
    else:
        spaces[VGG] = functools.partial(vgg.features, vgg.load(file))
    return spaces


def neighbour_figures(
    name: str, space: str, drawn: np.ndarray, pool: Sequence[Example], gallery: Sequence[Example], known: np.ndarray
) -> dict[str, Figure]:
    """Role in the top 5 and tone in the top 1 of the real neighbours of drawn images.

    drawn: their features [n, …], one an example of `pool`; known: the gallery's [G, …]. Chance: what five, or one, of
    the gallery at random get.
    """
    order = squared_distances(drawn, known).argsort(1)[:, :TOP]  # [n, 5]
    toned = [number for number, e in enumerate(pool) if has_one_tone(e)]
    roles = np.array([e.role for e in gallery])
    tones = np.array([e.tone for e in gallery])
    by_role = [(roles[order[n]] == pool[n].role).any() for n in toned]
    by_tone = [tones[order[n, 0]] == pool[n].tone for n in toned]
    missed = [
        math.comb(len(gallery) - int((roles == pool[n].role).sum()), TOP) / math.comb(len(gallery), TOP) for n in toned
    ]
    tone_chance = float(np.mean([(tones == pool[n].tone).mean() for n in toned]))
    return {
        f"{name}, neighbour's role right in top {TOP} ({space})": share(by_role, 1.0 - float(np.mean(missed))),
        f"{name}, neighbour's skin tone right ({space})": share(by_tone, tone_chance),
    }


def _spread(pool: Sequence[Example], count: int, offset: int = 0) -> list[Example]:
    """`count` examples at equal distances."""
    return [pool[(offset + i * len(pool) // count) % len(pool)] for i in range(count)]


def _couples(pool: Sequence[Example]) -> list[tuple[Example, Example]]:
    four = _spread(pool, 8)
    return list(zip(four[::2], four[1::2], strict=True))
