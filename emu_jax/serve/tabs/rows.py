"""Rows of an image and a text, the examples of a prompt; users add and remove rows."""

from __future__ import annotations

from collections.abc import Sequence

import gradio as gr
import numpy as np

from emu_jax.errors import UserError
from emu_jax.serve.engine import Engine
from emu_jax.serve.tabs.controls import EVENT, text
from emu_jax.serve.uploads import read_images


class Rows:
    """`count` rows, of which `first` are visible at the start. Their values form one list of inputs."""

    def __init__(self, engine: Engine, *, count: int, first: int, label: str, placeholder: str):
        self.engine, self.count = engine, count
        self.images: list[gr.Image] = []
        self.texts: list[gr.Textbox] = []
        rows = []
        for number in range(count):
            with gr.Row(visible=number < first, elem_classes="example", equal_height=True) as row:
                self.images.append(image(f"Image {number + 1}"))
                self.texts.append(
                    gr.Textbox(label=f"{label} {number + 1}", placeholder=placeholder, lines=2, scale=2, min_width=150)
                )
            rows.append(row)
        self.shown = gr.State(first)
        with gr.Row(elem_classes="tools"):
            more = gr.Button("Add an example", size="sm", min_width=120)
            fewer = gr.Button("Remove an example", size="sm", min_width=120)

        def show(shown: int) -> list:
            return [shown, *(gr.Row(visible=number < shown) for number in range(count))]

        async def add(shown: int) -> list:
            return show(min(shown + 1, count))

        async def remove(shown: int) -> list:
            return show(max(shown - 1, 1))

        more.click(add, self.shown, [self.shown, *rows], **EVENT)
        fewer.click(remove, self.shown, [self.shown, *rows], **EVENT)

    @property
    def inputs(self) -> list[gr.components.Component]:
        """The inputs of an event."""
        return [self.shown, *self.images, *self.texts]

    def split(self, values: Sequence[object]) -> tuple[Sequence[object], Sequence[object]]:
        """An event's values -> the values of `inputs`, and the other ones."""
        return values[: 1 + 2 * self.count], values[1 + 2 * self.count :]

    async def read(self, values: Sequence[object]) -> list[tuple[np.ndarray, str]]:
        """Values of `inputs` -> the filled rows; UserError for a half-filled row."""
        shown, paths, texts = int(values[0]), values[1 : 1 + self.count], values[1 + self.count :]
        filled = []
        for number, (path, words) in enumerate(zip(paths[:shown], texts[:shown], strict=True), 1):
            words = text(words, self.engine).strip()
            if bool(path) != bool(words):
                raise UserError(f"example {number} has {'no text' if path else 'no image'}; complete it, or clear it")
            if path:
                filled.append((path, words))
        images = await read_images(self.engine, [path for path, _ in filled])
        return [(pixels, words) for pixels, (_, words) in zip(images, filled, strict=True)]


def image(label: str, *, height: int = 128) -> gr.Image:
    """An upload field for one image."""
    field = gr.Image(
        label=label,
        type="filepath",
        image_mode=None,
        sources=["upload"],
        show_label=False,
        height=height,
        min_width=150,
        buttons=[],
        placeholder="Drop or choose an image",
    )
    # Gradio would open the file in this process, with any plugin of Pillow; `uploads.py` has it decoded elsewhere.
    field.preprocess = lambda payload: None if payload is None else payload.path
    return field
