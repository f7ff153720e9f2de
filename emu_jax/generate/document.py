"""Continuing a document with texts and images in turn: which kind of item comes next, and where the document ends.

`Emu.continue_document` and the server (`serve/document.py`) generate the items; the rules are here.
"""

from __future__ import annotations

from collections.abc import Sequence

from PIL.Image import Image as PILImage

from emu_jax.data.tokenizer import PlainText
from emu_jax.errors import UserError
from emu_jax.generate.prompt import ImageLike, Prompt

TEXT, IMAGE = KINDS = ("text", "image")


class Continuation:
    """A document under continuation; `parts` is the prompt of the next item, `count` the number of new items.

    Without a pattern the model decides: an image follows a text that ended at [IMG], a text follows an image, and the
    document ends where a text ends otherwise. With a pattern the document ends where the model has no text to add.

    Attributes:
      next: kind of the next item; None at the end.
    """

    def __init__(self, document: Prompt, max_items: int, pattern: Sequence[str] | None):
        check_continuation(max_items, pattern)
        self.parts: list[str | ImageLike] = list(document)
        self.count = 0
        self._pattern = None if pattern is None else list(pattern)[:max_items]
        self._max_items = max_items if self._pattern is None else len(self._pattern)
        self.next: str | None = None
        self._advance(TEXT)

    def add_text(self, text: str, *, is_empty: bool, begins_image: bool) -> None:
        """Appends a text.

        Args:
          is_empty: the text has no tokens. begins_image: the model began an image after it.
        """
        if not is_empty:
            self.parts.append(PlainText(text))  # a model may write out the name of a special token
            self.count += 1
        continues = begins_image if self._pattern is None else not is_empty
        self._advance(IMAGE if continues else None)

    def add_image(self, image: PILImage) -> None:
        """Appends a drawn image: like an image of the prompt, it is encoded for the next item."""
        self.parts.append(image)
        self.count += 1
        self._advance(TEXT)

    def _advance(self, kind: str | None) -> None:
        if kind is not None and self.count < self._max_items:
            self.next = kind if self._pattern is None else self._pattern[self.count]
        else:
            self.next = None


def check_continuation(max_items: int, pattern: Sequence[str] | None) -> None:
    """Raises UserError for settings that cannot work."""
    if max_items < 1:
        raise UserError(f"max_items={max_items}; expected at least 1")
    if any(kind not in KINDS for kind in pattern or ()):
        raise UserError(f"pattern={pattern}; expected text or image for every item")
