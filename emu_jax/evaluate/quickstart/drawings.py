"""Scores of a visual decoder on the embedded images: do a drawn image's nearest real neighbours show the right thing?

Images are drawn from held-out captions, and from held-out images' own embeddings (reconstruction); the VAE's round trip
is what neither can surpass. Neighbours are searched among all images by squared distance of pixels and of VGG features.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from emu_jax.checkpoints.vgg import find_weights, load
from emu_jax.data.embedded_chats import has_one_tone
from emu_jax.data.fluent_emoji import SPLITS, Example, examples
from emu_jax.evaluate import vgg
from emu_jax.evaluate.intervals import Figure, mean, share
from emu_jax.evaluate.quickstart.captions import CAPTION_TOKENS, in_batches, squared_distances
from emu_jax.generate.decoder import Drawing, GeneratedImage
from emu_jax.generate.model import Emu, GeneratedText

log = logging.getLogger(__name__)

Features = Callable[[Sequence[np.ndarray]], np.ndarray]  # images uint8 [H, W, 3] -> [N, …]

SPLIT = "heldout_combinations"
VGG = "VGG"
SETTINGS: dict[str, Any] = {"sampler": "dpmpp", "steps": 20, "guidance": 4.0}
VARIED, DRAWN_EACH = 12, 4  # captions, and drawings of each, that show how much the seeds change
VARIETY = "distance of drawings of one caption, over that of different captions"
READ_BACK = "drawn from the caption, named exactly so by the model itself"
TOP = 5  # nearest neighbours among which the role may be
ROLE_FIGURE, TONE_FIGURE = f"neighbour's role right in top {TOP}", "neighbour's skin tone right"


@dataclasses.dataclass(frozen=True)
class DrawnExample:
    """One held-out image, drawn from its caption and from its own embeddings: uint8 [H, W, 3] each."""

    example: Example
    drawn: np.ndarray
    reconstructed: np.ndarray


@dataclasses.dataclass(frozen=True)
class Drawings:
    """Figures by name, and images for the report.

    Attributes:
      blends: two real images, and the image drawn from both.
      continued: an image, and the text and image that continue it.
    """

    figures: dict[str, Figure]
    examples: list[DrawnExample]
    blends: list[tuple[Example, Example, np.ndarray]]
    continued: list[tuple[Example, list[GeneratedText | GeneratedImage]]]


def score(emu: Emu) -> Drawings:
    """Draws and scores the split of unseen combinations."""
    decoder = emu.check_drawing(Drawing(**SETTINGS))
    size = decoder.size
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

    def through_vae(part: Sequence[Example]) -> list[np.ndarray]:
        return list(decoder.round_trip(np.stack([e.pixels for e in part])))

    repeated = [(e, number) for e in _spread(pool, VARIED) for number in range(DRAWN_EACH)]

    def draw_again(part: Sequence[tuple[Example, int]]) -> list[np.ndarray]:
        chosen = [seeds[e.key] + len(pool) * (1 + number) for e, number in part]
        results = emu.generate_images([[e.caption] for e, _ in part], seeds=chosen, **SETTINGS)
        return [np.asarray(result.image) for result in results]

    drawn, rebuilt = in_batches(draw, pool, "draw captions"), in_batches(reconstruct, pool, "reconstruct")
    again = in_batches(draw_again, repeated, "draw captions again")
    coded = in_batches(through_vae, pool, "encode and decode")
    figures = {f"{SPLIT}: {READ_BACK}": share(_read_back(emu, pool, drawn))}
    for space, features in feature_spaces().items():
        sets = {"gallery": [e.pixels for e in gallery], "drawn from the caption": drawn, "reconstructed": rebuilt}
        sets |= {"through the VAE": coded, VARIETY: again}
        seen = {name: np.stack(in_batches(features, some, f"{space}: {name}")) for name, some in sets.items()}
        known = seen.pop("gallery")
        if space == VGG:
            seen = {name: vgg.equalised(some, known) for name, some in seen.items()}
            known = vgg.equalised(known, known)
        figures[f"{SPLIT}: {VARIETY} ({space})"] = variety(seen.pop(VARIETY))
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
    shown = [DrawnExample(*three) for three in zip(pool, drawn, rebuilt, strict=True)]
    return Drawings(figures, shown, blends, continued)


def _read_back(emu: Emu, pool: Sequence[Example], drawn: Sequence[np.ndarray]) -> list[bool]:
    """Whether the model names each of its drawings by the caption that it drew: text -> image -> text."""

    def caption(part: Sequence[np.ndarray]) -> list[str]:
        return [one.text for one in emu.generate_text([[image] for image in part], max_new_tokens=CAPTION_TOKENS)]

    captions = in_batches(caption, drawn, "read drawings back")
    return [text.strip() == example.caption for text, example in zip(captions, pool, strict=True)]


def variety(drawn: np.ndarray) -> Figure:
    """How different the drawings of one caption are: their mean distance, over that of different captions' drawings.

    0: every seed gives the same image; 1: the caption does not matter.

    Args:
      drawn: features [C * DRAWN_EACH, …] of drawings of C captions, one caption after another.
    """
    flat = drawn.reshape(len(drawn), -1)
    distances = np.sqrt(np.maximum(squared_distances(flat, flat), 0.0))
    caption = np.arange(len(flat)) // DRAWN_EACH
    same = caption[:, None] == caption
    between = distances[~same].mean()
    pairs = same & ~np.eye(len(flat), dtype=bool)
    within = [distances[pairs & (caption == one)[:, None]].mean() for one in range(caption[-1] + 1)]
    return mean(np.array(within) / between, paper_scale=1.0)


def feature_spaces() -> dict[str, Features]:
    """Features that images are compared by: pixels, and VGG features where the weights are installed."""
    spaces: dict[str, Features] = {"pixels": lambda images: np.stack(images).astype(np.float32) / 255.0}
    file = find_weights()
    if file is None:
        log.warning("no VGG features: install emu-jax[eval] to compare images by them too")
    else:
        spaces[VGG] = functools.partial(vgg.features, load(file))
    return spaces


def neighbour_figures(
    name: str, space: str, drawn: np.ndarray, pool: Sequence[Example], gallery: Sequence[Example], known: np.ndarray
) -> dict[str, Figure]:
    """Role in the top 5 and tone in the top 1 of the real neighbours of drawn images.

    Args:
      drawn: features [n, …] of the images drawn for `pool`.
      known: features [G, …] of the gallery.

    Returns: shares; chance is that of five images of the gallery at random, or of one.
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
        f"{name}, {ROLE_FIGURE} ({space})": share(by_role, 1.0 - float(np.mean(missed))),
        f"{name}, {TONE_FIGURE} ({space})": share(by_tone, tone_chance),
    }


def _spread(pool: Sequence[Example], count: int, offset: int = 0) -> list[Example]:
    """`count` examples at equal distances."""
    return [pool[(offset + i * len(pool) // count) % len(pool)] for i in range(count)]


def _couples(pool: Sequence[Example]) -> list[tuple[Example, Example]]:
    four = _spread(pool, 8)
    return list(zip(four[::2], four[1::2], strict=True))
