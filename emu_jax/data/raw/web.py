"""What readers of web documents share: which images are kept, and whether anything is left of a document.

MMC4 keeps an image whose CLIP similarity to its sentence is at least 0.32. Other data state no similarities; with CLIP
weights, an image is compared with the text that follows it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from emu_jax.data.clip_scores import load_scorer
from emu_jax.data.document import Text
from emu_jax.data.images import decode_image
from emu_jax.data.raw.reader import RawDocument, RawImage, Reject
from emu_jax.errors import UserError

CLIP_CHARACTERS = 1000  # more than CLIP's 77 tokens can hold


@dataclasses.dataclass(frozen=True)
class Found:
    """An image of a document: number `number`, from 0, of those that the document names."""

    number: int
    image: RawImage


def check_similarity(where: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not -1.0 <= value <= 1.0:
        raise UserError(f"{where}.min_similarity={value!r}; expected a cosine from -1 to 1, as 0.32")


def low_similarity(key: str, number: int, score: float, least: float) -> Reject:
    detail = f"similarity {score:.3f}; at least {least} is kept"
    return Reject(f"{key}#{number}", "low_similarity", detail, whole=False)


def embed_found(images: Sequence[Found], key: str, clip: str) -> tuple[list[Found], np.ndarray, list[Reject]]:
    """The images that can be decoded, their CLIP vectors [P, D], and rejects for the others."""
    good: list[Found] = []
    bad: list[Reject] = []

    def decoded() -> Iterator[np.ndarray]:  # lazily: the scorer holds few at a time
        for found in images:
            name = f"{key}#{found.number}"
            try:
                data = found.image.data
                pixels = decode_image(data, name) if isinstance(data, bytes) else data
            except UserError as error:
                bad.append(Reject(name, "unreadable_image", str(error), whole=False))
                continue
            good.append(found)
            yield pixels

    return good, load_scorer(clip).embed_images(decoded()), bad


def score_by_neighbour(
    key: str, parts: Sequence[Text | Found], clip: str, least: float
) -> Iterator[Text | Found | Reject]:
    """The parts in order, without images whose similarity to the text after them is less than `least`.

    An image at the end of a document is compared with the text before it.
    """
    images = [part for part in parts if isinstance(part, Found)]
    good, vectors, bad = embed_found(images, key, clip)
    yield from bad
    neighbours = {found.number: text for found, text in _neighbours(parts)}
    texts = load_scorer(clip).embed_texts([neighbours[found.number][:CLIP_CHARACTERS] for found in good])
    scores = {found.number: float(image @ text) for found, image, text in zip(good, vectors, texts, strict=True)}
    for part in parts:
        if isinstance(part, Text):
            yield part
        elif part.number in scores:
            score = scores[part.number]
            if score >= least:
                yield Found(part.number, RawImage(part.image.data, score))
            else:
                yield low_similarity(key, part.number, score, least)


def _neighbours(parts: Sequence[Text | Found]) -> Iterator[tuple[Found, str]]:
    """Every image with the text after it, or with the document's last text."""
    text = next((part.text for part in reversed(parts) if isinstance(part, Text)), "")
    for part in reversed(parts):
        if isinstance(part, Text):
            text = part.text
        else:
            yield part, text


def finish(
    key: str, parts: Sequence[Text | Found], *, require_image: bool = True, clip: str = "", least: float = 0.32
) -> Iterator[RawDocument | Reject]:
    """Rejects for the images that CLIP leaves out, then the document, or the reason why nothing is left of it.

    Args:
      clip: folder of CLIP weights; "" keeps all images.
      least: smallest similarity that is kept.
    """
    if not any(isinstance(part, Text) for part in parts):
        yield Reject(key, "no_text", "no text is left")
        return
    if clip and any(isinstance(part, Found) for part in parts):
        judged = list(score_by_neighbour(key, parts, clip, least))
        yield from (part for part in judged if isinstance(part, Reject))
        parts = [part for part in judged if not isinstance(part, Reject)]
    if require_image and not any(isinstance(part, Found) for part in parts):
        yield Reject(key, "no_image", "no image is left")
        return
    yield RawDocument(key, "web", tuple(part.image if isinstance(part, Found) else part for part in parts))
