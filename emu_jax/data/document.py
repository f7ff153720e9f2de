"""A document: texts and pictures in the order in which they are read."""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Text:
    """A piece of text; a training document's text never contains special tokens, whatever it spells."""

    text: str


@dataclasses.dataclass(frozen=True)
class Image:
    """Pixels uint8 [H, W, 3] and a key: pictures of one packed row that share a key are encoded once."""

    pixels: np.ndarray
    key: str


@dataclasses.dataclass(frozen=True)
class Document:
    """Texts and images in order.

    Attributes:
      text_weight: scales the cross-entropy of the document's tokens.
      visual_weight: scales the regression of its images.
    """

    parts: tuple[Text | Image, ...]
    text_weight: float = 1.0
    visual_weight: float = 1.0
