"""`Emu.continue_document` over an engine: the same items, told while they come."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator

from emu_jax.errors import UserError
from emu_jax.generate.model import GeneratedImage
from emu_jax.generate.prompt import Prompt
from emu_jax.serve.engine import DrawSettings, Engine, TextSettings

TEXT, IMAGE = "text", "image"


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a document goes on with; see `Emu.continue_document`.

    Attributes:
      pattern: "text" or "image" for every item to come; None: the model decides, if it has learnt to begin images.
      drawing: its seed is the first item's, the next item's is one more, and so on.
    """

    max_items: int = 4
    pattern: tuple[str, ...] | None = None
    max_new_tokens: int = 32
    drawing: DrawSettings = dataclasses.field(default_factory=DrawSettings)

    def check(self, engine: Engine) -> None:
        """Raises UserError for a plan that cannot work, or lies beyond the engine's limits."""
        limits = engine.limits
        limits.check("max_items", self.max_items, 1, limits.items)
        TextSettings(self.max_new_tokens).check(limits)
        if any(kind not in (TEXT, IMAGE) for kind in self.pattern or ()):
            raise UserError(f"pattern={self.pattern}; expected text or image for every item")
        if self.pattern is None or IMAGE in self.pattern:
            self.drawing.check(limits, engine.plain)


@dataclasses.dataclass(frozen=True)
class Piece:
    """A piece of the text that is being written."""

    text: str


@dataclasses.dataclass(frozen=True)
class Drawn:
    """How far the image is that is being drawn, in U-Net calls."""

    made: int
    calls: int


@dataclasses.dataclass(frozen=True)
class Item:
    """An item that is whole: a text or an image."""

    content: str | GeneratedImage


async def continue_document(engine: Engine, document: Prompt, plan: Plan) -> AsyncIterator[Piece | Drawn | Item]:
    """Continues a document as `Emu.continue_document` does. Who leaves early closes the iterator: its place is free.

    Raises:
      UserError: a plan or a document that cannot work. Busy, Stopping, TimeUp, Failed: as the engine does.
    """
    plan.check(engine)
    parts, items = list(document), 0
    kinds = plan.pattern[: plan.max_items] if plan.pattern is not None else None
    kind = kinds[0] if kinds else TEXT
    while items < (plan.max_items if kinds is None else len(kinds)):
        if kind == IMAGE:
            settings = dataclasses.replace(plan.drawing, seed=plan.drawing.seed + items)
            drawing = await engine.draw(parts, settings)
            try:
                async for made, calls in drawing:
                    yield Drawn(made, calls)
                image = await drawing.result()
            finally:
                drawing.cancel()
            parts.append(image.image)
            items += 1
            yield Item(image)
            kind = TEXT
        else:
            writing = await engine.write(parts, TextSettings(plan.max_new_tokens, until_image=True))
            try:
                async for piece in writing:
                    yield Piece(piece)
                text = await writing.result()
            finally:
                writing.cancel()
            if text.new_tokens:
                parts.append(text.text)
                items += 1
                yield Item(text.text)
            if not (text.ended_by == "image" if kinds is None else text.new_tokens):
                break  # the model has nothing more to say
            kind = IMAGE
        if kinds is not None and items < len(kinds):
            kind = kinds[items]
