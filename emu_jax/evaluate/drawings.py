"""Scores of a visual decoder on the embedded pictures: is the real picture closest to a drawn one of the right kind?

In: a model with a decoder. Out: `Drawings`: figures with intervals and chance, and pictures for the report. Pictures
are drawn from held-out captions, and from held-out pictures' own embeddings (reconstruction); each is looked up among
all pictures by squared distance of pixels.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from emu_jax.api import Emu, GeneratedImage, GeneratedText
from emu_jax.data.fluent_emoji import SPLITS, Example, examples
from emu_jax.evaluate.pairs import Figure, has_one_tone, in_batches, share, squared_distances

SPLIT = "heldout_combinations"
SETTINGS = {"sampler": "dpmpp", "steps": 20, "guidance": 4.0}
TOP = 5  # places in which the role may stand


@dataclasses.dataclass(frozen=True)
class Drawing:
    """One held-out picture, drawn from its caption and from its own embeddings; uint8 [H, W, 3] each."""

    example: Example
    drawn: np.ndarray
    reconstructed: np.ndarray


@dataclasses.dataclass(frozen=True)
class Drawings:
    """`blends`: two real pictures and what is drawn from both; `continued`: a picture and the reply to it."""

    figures: dict[str, Figure]
    drawings: list[Drawing]
    blends: list[tuple[Example, Example, np.ndarray]]
    continued: list[tuple[Example, list[GeneratedText | GeneratedImage]]]


def score(emu: Emu) -> Drawings:
    """Draws and scores the split of unseen combinations."""
    size = emu.decoder.size
    gallery = [example for split in SPLITS for example in examples(split, size)]
    pixels = np.stack([example.pixels for example in gallery]).astype(np.float32) / 255.0  # [G, H, W, 3]
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
    figures = {}
    for name, pictures in {"drawn from the caption": drawn, "reconstructed": rebuilt}.items():
        figures |= neighbour_figures(f"{SPLIT}: {name}", np.stack(pictures), pool, gallery, pixels)
    toned = [e for e in pool if has_one_tone(e)]
    blends = [
        (a, b, np.asarray(emu.generate_image([a.pixels, b.pixels], **SETTINGS).image)) for a, b in _couples(toned)
    ]
    continued = [
        (e, emu.continue_document([e.pixels], pattern=("text", "image"), **SETTINGS))
        for e in _spread(toned, 3, offset=2)
    ]
    return Drawings(figures, [Drawing(*three) for three in zip(pool, drawn, rebuilt, strict=True)], blends, continued)


def neighbour_figures(
    name: str, pictures: np.ndarray, pool: Sequence[Example], gallery: Sequence[Example], features: np.ndarray
) -> dict[str, Figure]:
    """Role in the top 5 and tone in the top 1 of the real neighbours of pictures uint8 [n, H, W, 3].

    features: of the gallery, float32 [G, H, W, 3] in [0, 1]. Chance: what five, or one, of the gallery at random get.
    """
    order = squared_distances(pictures.astype(np.float32) / 255.0, features).argsort(1)[:, :TOP]  # [n, 5]
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
        f"{name}, neighbour's role right in top {TOP}": share(by_role, 1.0 - float(np.mean(missed))),
        f"{name}, neighbour's skin tone right": share(by_tone, tone_chance),
    }


def _spread(pool: Sequence[Example], count: int, offset: int = 0) -> list[Example]:
    """`count` examples at equal distances."""
    return [pool[(offset + i * len(pool) // count) % len(pool)] for i in range(count)]


def _couples(pool: Sequence[Example]) -> list[tuple[Example, Example]]:
    four = _spread(pool, 8)
    return list(zip(four[::2], four[1::2], strict=True))
