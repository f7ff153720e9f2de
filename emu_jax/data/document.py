"""A document: texts and images in reading order."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from emu_jax.data.images import EncodedImage
from emu_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Text:
    """A piece of text. Names of special tokens in it stay ordinary text (see `system_messages.py` for the exception).

    Attributes:
      role: the speaker in a chat: "system", "user" or "assistant"; "" in other documents.
    """

    text: str
    role: str = ""


@dataclasses.dataclass(frozen=True)
class Image:
    """An image; images of one packed row that share a key are encoded once.

    Attributes:
      content: uint8 [H, W, 3], or a function that reads them: every host plans all rows, but decodes only the images
        of its own rows.
    """

    content: np.ndarray | Callable[[], np.ndarray]
    key: str

    @property
    def pixels(self) -> np.ndarray:
        """uint8 [H, W, 3]; read again on each access if `content` is a function."""
        return self.content() if callable(self.content) else self.content

    def into(self, out: np.ndarray) -> None:
        """Reads the pixels into a contiguous uint8 [H, W, 3].

        Raises:
          UserError: the pixels have another shape or type.
        """
        if isinstance(self.content, EncodedImage) and out.shape == (self.content.size, self.content.size, 3):
            self.content.into(out)
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
    """Texts and images in reading order.

    >>> cat = Image(np.zeros((4, 4, 3), np.uint8), "cat.png")
    >>> Document((Text("A cat:"), cat, Text("asleep"))).parts[2].text
    'asleep'

    Attributes:
      text_weight: weight of the cross-entropy of its tokens.
      visual_weight: weight of the regression of its images; with 0 they are only inputs.
      max_tokens: length at which its sequence is truncated; 0 does not truncate.
      window: if it is longer than a row, each epoch reads one random window of at most a row instead of all pieces.
    """

    parts: tuple[Text | Image, ...]
    text_weight: float = 1.0
    visual_weight: float = 1.0
    max_tokens: int = 0
    window: bool = False

    def read_only(self) -> Document:
        """The same document with images that are inputs only, not regression targets."""
        return dataclasses.replace(self, visual_weight=0.0)

    @property
    def is_read(self) -> bool:
        """Whether learnt text follows an image; otherwise nothing is learnt from the image as an input."""
        first = next((place for place, part in enumerate(self.parts) if isinstance(part, Image)), len(self.parts))
        return self.text_weight > 0 and any(isinstance(part, Text) and part.text for part in self.parts[first:])
