"""A document: texts and images in the order in which they are read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from emu_jax.data.images import StoredJpeg
from emu_jax.errors import UserError


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
    """An image; images of one packed row that share a key are encoded once.

    Attributes:
      source: uint8 [H, W, 3], or what reads them: rows are planned by every host, but a host decodes only the images
        of its own rows.
    """

    source: np.ndarray | Callable[[], np.ndarray]
    key: str

    @property
    def pixels(self) -> np.ndarray:
        """uint8 [H, W, 3]; read anew each time where `source` is a function."""
        return self.source() if callable(self.source) else self.source

    def into(self, out: np.ndarray) -> None:
        """Reads the pixels into a contiguous uint8 [H, W, 3].

        Raises:
          UserError: they have another shape or type.
        """
        if isinstance(self.source, StoredJpeg) and out.shape == (self.source.size, self.source.size, 3):
            self.source.into(out)
            return
        pixels = self.pixels
        # The type is checked because NumPy would cast floats in [0, 1] to a black image.
        if pixels.dtype != np.uint8 or pixels.shape != out.shape:
            raise UserError(
                f"image {self.key}: expected uint8 {list(out.shape)} as the model reads it, "
                f"got {pixels.dtype} {list(pixels.shape)}; resize it when decoding"
            )
        out[...] = pixels


@dataclasses.dataclass(frozen=True)
class Document:
    """Texts and images in order.

    >>> cat = Image(np.zeros((4, 4, 3), np.uint8), "cat.png")
    >>> Document((Text("A cat:"), cat, Text("asleep"))).parts[2].text
    'asleep'

    Attributes:
      text_weight: scales the cross-entropy of the document's tokens.
      visual_weight: scales the regression of its images; 0: they are only read.
      max_tokens: where its sequence ends; 0: where its parts do.
      window: where it is longer than a row, a visit reads one piece of at most a row, which begins at random.
    """

    parts: tuple[Text | Image, ...]
    text_weight: float = 1.0
    visual_weight: float = 1.0
    max_tokens: int = 0
    window: bool = False

    def read_only(self) -> Document:
        """The same, with images that are read and not predicted."""
        return dataclasses.replace(self, visual_weight=0.0)

    @property
    def is_read(self) -> bool:
        """Whether something that is learnt follows an image: only then an image can be read."""
        first = next((place for place, part in enumerate(self.parts) if isinstance(part, Image)), len(self.parts))
        return self.text_weight > 0 and any(isinstance(part, Text) and part.text for part in self.parts[first:])
