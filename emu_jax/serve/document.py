"""`Emu.continue_document` over an engine: the same items, with progress while they are generated."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator

from emu_jax.generate.decoder import GeneratedImage
from emu_jax.generate.document import IMAGE, Continuation, check_continuation
from emu_jax.generate.prompt import Prompt
from emu_jax.serve.engine import Engine
from emu_jax.serve.settings import DrawSettings, TextSettings


@dataclasses.dataclass(frozen=True)
class DocumentSettings:
    """How a document is continued; see `Emu.continue_document`.

    Attributes:
      pattern: "text" or "image" for every new item; for None the model decides, if it has learnt to begin images.
      drawing: with the first item's seed; the second item has the next seed, and so on.
    """

    max_items: int = 4
    pattern: tuple[str, ...] | None = None
    max_new_tokens: int = 32
    drawing: DrawSettings = dataclasses.field(default_factory=DrawSettings)

    def check(self, engine: Engine) -> None:
        """Raises UserError for settings that cannot work or exceed the engine's limits."""
        limits = engine.limits
        limits.check("max_items", self.max_items, 1, limits.items)
        TextSettings(self.max_new_tokens).check(limits)
        check_continuation(self.max_items, self.pattern)
        if self.pattern is None or IMAGE in self.pattern:
            self.drawing.check(limits, engine.plain)


@dataclasses.dataclass(frozen=True)
class TextPiece:
    """A piece of the current text."""

    text: str


@dataclasses.dataclass(frozen=True)
class DrawingProgress:
    """Progress of the current image, in U-Net calls."""

    made: int
    calls: int


@dataclasses.dataclass(frozen=True)
class Item:
    """A finished text or image."""

    content: str | GeneratedImage


async def continue_document(
    engine: Engine, document: Prompt, settings: DocumentSettings
) -> AsyncIterator[TextPiece | DrawingProgress | Item]:
    """Continues a document as `Emu.continue_document` does. A caller that stops early must close the iterator.

    Raises:
      UserError: settings or a document that cannot work. Busy, Stopping, TimeUp, Failed: as the engine.
    """
    settings.check(engine)
    continuation = Continuation(document, settings.max_items, settings.pattern)
    while continuation.next is not None:
        if continuation.next == IMAGE:
            drawing = await engine.draw(continuation.parts, settings.drawing.following(continuation.count))
            try:
                async for made, calls in drawing:
                    yield DrawingProgress(made, calls)
                image = await drawing.result()
            finally:
                drawing.cancel()
            continuation.add_image(image.image)
            yield Item(image)
        else:
            writing = await engine.complete(continuation.parts, TextSettings(settings.max_new_tokens, until_image=True))
            try:
                async for piece in writing:
                    yield TextPiece(piece)
                text = await writing.result()
            finally:
                writing.cancel()
            is_empty = not text.new_tokens
            continuation.add_text(text.text, is_empty=is_empty, begins_image=text.ended_by == "image")
            if not is_empty:
                yield Item(text.text)
