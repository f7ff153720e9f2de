"""Images drawn from words, from other images (blending), and from few-shot examples; progress is shown by step."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Sequence
from typing import Any

import gradio as gr
import numpy as np

from emu_jax.errors import UserError
from emu_jax.generate.decoder import GeneratedImage
from emu_jax.serve.downloads import Archive, drawn_png, write
from emu_jax.serve.engine import Engine
from emu_jax.serve.settings import DrawSettings
from emu_jax.serve.tabs.controls import (
    EVENT,
    draw_controls,
    draw_settings,
    note,
    offer,
    progress,
    text,
    whole,
    with_errors,
)
from emu_jax.serve.tabs.rows import Rows
from emu_jax.serve.tabs.samples import Sample
from emu_jax.serve.ticket import Ticket
from emu_jax.serve.uploads import read_images

NO_DECODER = """### This model does not draw
It has no visual decoder. `launch/quickstart.sh --all` trains one; `emu-jax serve --decoder FOLDER` loads one from a
folder that holds `unet` and `vae`.
"""
UPDATE_SECONDS = 0.25  # between two updates of the progress
WAITING = "Waiting for a free slot …"


def show(engine: Engine, name: str, samples: list[Sample]) -> None:
    """Adds the tab's content."""
    if not engine.draws:
        gr.Markdown(NO_DECODER, elem_classes="empty")
        return
    with gr.Row(equal_height=False):
        with gr.Column(scale=1, min_width=320):
            with gr.Tabs(elem_classes="inner"):
                with gr.Tab("Words"):
                    words = gr.Textbox(
                        label="What to draw", placeholder=samples[0].name, lines=2, elem_id="draw-words", max_lines=6
                    )
                    by_words = gr.Button("Draw", variant="primary", elem_id="draw-by-words")
                    names = gr.Examples(
                        [[sample.name] for sample in samples[:6]],
                        words,
                        label="Names that were not in the training set: one click draws",
                        elem_id="draw-names",
                    )
                with gr.Tab("Blend"):
                    blend = _Blend(samples)
                    by_blend = gr.Button("Blend", variant="primary", elem_id="draw-by-blend")
                with gr.Tab("Examples"):
                    gr.HTML(note("Images with texts, then a text: the model draws its image."), padding=False)
                    rows = Rows(engine, count=4, first=2, label="Text", placeholder="what the image shows")
                    last = gr.Textbox(label="Text to draw", lines=2, elem_id="draw-last")
                    by_rows = gr.Button("Draw", variant="primary", elem_id="draw-by-rows")
                    in_context = gr.Examples(
                        [[samples[1].path, samples[1].name, samples[7].path, samples[7].name, samples[2].name]],
                        [rows.images[0], rows.texts[0], rows.images[1], rows.texts[1], last],
                        label="Example",
                        example_labels=[f"{samples[1].thing}, {samples[7].thing}, then a {samples[2].thing}"],
                    )
            with gr.Accordion("Settings", open=False, elem_id="draw-settings"):
                controls = draw_controls(engine)
                count = gr.Slider(1, engine.limits.drawings, 1, step=1, label="Images", info="With consecutive seeds")
        with gr.Column(scale=1, min_width=320):
            gallery = gr.Gallery(
                label="Drawn images",
                elem_id="drawn",
                columns=2,
                fit_columns=False,
                object_fit="contain",
                interactive=False,
                buttons=["download", "fullscreen"],
            )
            status = gr.HTML(
                note("The PNG files of drawn images contain their settings."), elem_id="draw-status", padding=False
            )
            with gr.Row(elem_classes="tools"):
                stop = gr.Button("Stop", size="sm", min_width=90, interactive=False)
                download = gr.DownloadButton("Download with settings", size="sm", min_width=90, interactive=False)

    async def draw(prompt: Sequence[str | np.ndarray], count: object, *values: object) -> AsyncIterator[tuple]:
        first, images = draw_settings(*values), whole(count, "images")
        engine.limits.check("images", images, 1, engine.limits.drawings)
        settings = [first.following(number) for number in range(images)]
        yield [], progress(WAITING), gr.Button(interactive=True), offer()
        results: list[GeneratedImage] = []
        async with contextlib.aclosing(draw_all(engine, prompt, settings)) as events:
            async for event in events:
                if isinstance(event, list):
                    results = event
                else:
                    made, calls = event
                    words = f"Step {made} of {calls}" if calls else WAITING
                    yield gr.skip(), progress(words, made, calls), gr.skip(), gr.skip()
        paths, archive = await asyncio.to_thread(save, name, prompt, settings, results)
        flagged = sum(bool(result.flagged) for result in results)
        black = f" {flagged} of them flagged by the safety checker, and black." if flagged else ""
        shown = [(path, f"seed {each.seed}") for path, each in zip(paths, settings, strict=True)]
        yield shown, note(f"{summary(first, images)}.{black}"), gr.Button(interactive=False), offer(archive)

    async def from_words(words: object, *values: object) -> AsyncIterator[tuple]:
        prompt = text(words, engine).strip()
        if not prompt:
            raise UserError("the prompt is empty; say what to draw")
        async for update in draw([prompt], *values):
            yield update

    async def from_blend(images: list[tuple[str, Any]] | None, *values: object) -> AsyncIterator[tuple]:
        paths = [path for path, _ in images or ()]
        if not paths:
            raise UserError("there are no images to blend; add at least two")
        read = await read_images(engine, paths)
        async for update in draw(read, *values):
            yield update

    async def from_rows(*values: object) -> AsyncIterator[tuple]:
        own, (words, *others) = rows.split(values)
        examples, words = await rows.read(own), text(words, engine).strip()
        if not words:
            raise UserError("the last text is empty; say what to draw")
        # Each text comes before its image, as in the pairs that the decoder is trained on.
        prompt = [part for image, label in examples for part in (f" {label}", image)]
        async for update in draw([*prompt, f" {words}" if prompt else words], *others):
            yield update

    async def nothing_drawn() -> tuple:
        return note("Nothing was drawn."), gr.Button(interactive=False)

    inputs, outputs = [count, *controls], [gallery, status, stop, download]
    drawing = [
        by_words.click(with_errors(from_words), [words, *inputs], outputs, **EVENT),
        words.submit(with_errors(from_words), [words, *inputs], outputs, **EVENT),
        names.load_input_event.success(with_errors(from_words), [words, *inputs], outputs, **EVENT),
        by_blend.click(with_errors(from_blend), [blend.gallery, *inputs], outputs, **EVENT),
        blend.examples.load_input_event.success(with_errors(from_blend), [blend.gallery, *inputs], outputs, **EVENT),
        by_rows.click(with_errors(from_rows), [*rows.inputs, last, *inputs], outputs, **EVENT),
        in_context.load_input_event.success(with_errors(from_rows), [*rows.inputs, last, *inputs], outputs, **EVENT),
    ]
    for event in drawing:
        event.failure(nothing_drawn, None, [status, stop], **EVENT)
    stop.click(nothing_drawn, None, [status, stop], cancels=drawing, **EVENT)


class _Blend:
    """Images in an order that the user can change: a selected image moves forward or backward."""

    def __init__(self, samples: list[Sample]):
        gr.HTML(note("The order of the images matters; select one to move or remove it."), padding=False)
        self.gallery = gr.Gallery(
            label="Images to blend",
            show_label=False,
            elem_id="blend",
            type="filepath",
            file_types=["image"],
            sources=["upload"],
            columns=4,
            fit_columns=False,
            height=None,
            object_fit="contain",
            interactive=True,
            buttons=[],
            allow_preview=False,
        )
        selected = gr.State(None)
        with gr.Row(elem_classes="tools"):
            earlier = gr.Button("◀ Earlier", size="sm", min_width=80)
            later = gr.Button("Later ▶", size="sm", min_width=80)
            remove = gr.Button("Remove", size="sm", min_width=80)
        self.examples = gr.Examples(
            [[[samples[2].path, samples[6].path]], [[samples[4].path, samples[1].path, samples[9].path]]],
            self.gallery,
            label="Images that were not in the training set: one click blends",
            elem_id="draw-blends",
        )

        async def select(event: gr.SelectData) -> int:
            return event.index

        def changer(by: int | None):
            """Moves the selected image by so many places; None removes it."""

            async def change(images: list | None, index: int | None) -> tuple:
                images = list(images or ())
                if index is None or not 0 <= index < len(images):
                    gr.Warning("Select one of the images first.")
                    return gr.skip(), index
                image, to = images.pop(index), None
                if by is not None:
                    to = min(max(index + by, 0), len(images))
                    images.insert(to, image)
                return gr.Gallery(value=numbered(images), selected_index=to), to

            return change

        self.gallery.select(select, None, selected, **EVENT)
        both = [self.gallery, selected]
        for button, by in ((earlier, -1), (later, 1), (remove, None)):
            button.click(changer(by), both, both, **EVENT)


def numbered(images: Sequence[tuple[str, Any]]) -> list[tuple[str, str]]:
    """Images with their numbers as captions."""
    return [(path, str(number)) for number, (path, _) in enumerate(images, 1)]


async def draw_all(
    engine: Engine, prompt: Sequence[str | np.ndarray], settings: Sequence[DrawSettings]
) -> AsyncIterator[tuple[int, int] | list[GeneratedImage]]:
    """Draws a prompt with several settings at once: yields (calls made, calls in total), and at the end all images."""
    engine.limits.check_images(sum(not isinstance(part, str) for part in prompt))
    tickets: list[Ticket] = []
    made: dict[int, tuple[int, int]] = {}

    async def follow(number: int, ticket: Ticket) -> GeneratedImage:
        async for event in ticket:
            made[number] = event
        return await ticket.result()

    tasks: list[asyncio.Task] = []
    try:
        for each in settings:
            tickets.append(await engine.draw(prompt, each))
        tasks = [asyncio.create_task(follow(*item)) for item in enumerate(tickets)]
        while pending := [task for task in tasks if not task.done()]:
            await asyncio.wait(pending, timeout=UPDATE_SECONDS)
            calls = max((calls for _, calls in made.values()), default=0)
            yield sum(count for count, _ in made.values()), calls * len(tickets)
        yield [task.result() for task in tasks]
    finally:
        for ticket in tickets:
            ticket.cancel()
        for task in tasks:
            task.cancel()


def summary(settings: DrawSettings, count: int) -> str:
    """Settings in one line."""
    last = settings.following(count - 1).seed
    seeds = f"seed {settings.seed}" if count == 1 else f"seeds {settings.seed} to {last}"
    return f"{settings.sampler}, {settings.steps} steps, guidance {settings.guidance:g}, {seeds}"


def save(
    name: str, prompt: Sequence[str | np.ndarray], settings: Sequence[DrawSettings], results: Sequence[GeneratedImage]
) -> tuple[list[str], str]:
    """Saves drawn images as PNG files, and everything as a zip; returns their paths."""
    archive = Archive()
    recorded: dict[str, Any] = {"model": name, "kind": "drawing", "prompt": archive.parts(prompt), "drawings": []}
    paths = []
    for number, (each, result) in enumerate(zip(settings, results, strict=True), 1):
        content = drawn_png(result, prompt, each)
        paths.append(write(f"drawing-seed-{each.seed}.png", content))
        file = archive.add(f"drawing-{number}.png", content)
        recorded["drawings"].append({"file": file, "flagged": result.flagged, "settings": dataclasses.asdict(each)})
    return paths, archive.save("drawing", recorded)
