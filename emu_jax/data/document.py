"""A document: texts and pictures in the order in which they are read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np


@dataclasses.dataclass(frozen=True)
class Text:
    """A piece of text; a training document's text never contains special tokens, whatever it spells.

    Attributes:
      role: who says it in a chat, "system", "user" or "assistant"; "" elsewhere.
    """

    text: str
    role: str = ""


@dataclasses.dataclass(frozen=True)
class Image:
    """A picture; pictures of one packed row that share a key are encoded once.

    Attributes:
      source: uint8 [H, W, 3], or what reads them: rows are planned by every host, but a host decodes only the pictures
        of its own rows.
    """

    source: np.ndarray | Callable[[], np.ndarray]
    key: str

    @property
    def pixels(self) -> np.ndarray:
        """uint8 [H, W, 3]; read anew each time where `source` is a function."""
        return self.source() if callable(self.source) else self.source


@dataclasses.dataclass(frozen=True)
class Document:
    """Texts and images in order.

    Attributes:
      text_weight: scales the cross-entropy of the document's tokens.
      visual_weight: scales the regression of its images.
      max_tokens: where its sequence ends; 0: where its parts do.
      source: number of the source it is from, of those that are mixed.
    """

    parts: tuple[Text | Image, ...]
    text_weight: float = 1.0
    visual_weight: float = 1.0
    max_tokens: int = 0
    source: int = 0
