"""Images from words, from other images in an order, and from examples; progress is shown step by step."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Sequence
from typing import Any

import gradio as gr
import numpy as np

from emu_jax.errors import UserError
from emu_jax.generate.model import GeneratedImage
from emu_jax.serve.downloads import Record, drawn_png, write
from emu_jax.serve.engine import DrawSettings, Engine, Ticket
from emu_jax.serve.tabs.controls import EVENT, DrawControls, draw_settings, note, progress, text, told, whole
from emu_jax.serve.tabs.rows import Rows
from emu_jax.serve.tabs.samples import Sample
from emu_jax.serve.uploads import read_images

HOW = """### This model does not draw
There is no visual decoder beside it. `launch/quickstart.sh` trains one, and `emu-jax serve --decoder FOLDER` takes a
folder that holds `unet` and `vae`.
"""
TELL_EVERY = 0.25  # seconds
WAITING = "Waiting for a place …"


def show(engine: Engine, name: str, samples: list[Sample]) -> None:
    """Adds the tab's content."""
    if not engine.draws:
        gr.Markdown(HOW, elem_classes="empty")
        return
    with gr.Row(equal_height=False):
        with gr.Column(scale=1, min_width=320):
            with gr.Tabs(elem_classes="inner"):
                with gr.Tab("Words"):
                    words = gr.Textbox(
                        label="What to draw", placeholder=samples[0].name, lines=2, elem_id="draw-words", max_lines=6
                    )
                    by_words = gr.Button("Draw", variant="primary", elem_id="draw-by-words")
                    gr.Examples([[sample.name] for sample in samples[:6]], words, label="Names that training left out")
                with gr.Tab("Blend"):
                    blend = _Blend(samples)
                    by_blend = gr.Button("Blend", variant="primary", elem_id="draw-by-blend")
                with gr.Tab("Examples"):
                    gr.HTML(note("Images with texts, then a text, whose image is drawn."), padding=False)
                    rows = Rows(engine, count=4, first=2, label="Text", placeholder="what the image shows")
                    last = gr.Textbox(label="The text to draw", lines=2, elem_id="draw-last")
                    by_rows = gr.Button("Draw", variant="primary", elem_id="draw-by-rows")
                    gr.Examples(
                        [[samples[1].path, samples[1].name, samples[7].path, samples[7].name, samples[2].name]],
                        [rows.images[0], rows.texts[0], rows.images[1], rows.texts[1], last],
                        label="Example",
                        example_labels=[f"{samples[1].thing}, {samples[7].thing}, then a {samples[2].thing}"],
                    )
            with gr.Accordion("Settings", open=False, elem_id="draw-settings"):
                controls = DrawControls.show(engine)
                count = gr.Slider(1, engine.limits.drawings, 1, step=1, label="Images", info="With seeds that follow")
        with gr.Column(scale=1, min_width=320):
            gallery = gr.Gallery(
                label="Drawn",
                elem_id="drawn",
                columns=2,
                fit_columns=False,
                object_fit="contain",
                interactive=False,
                buttons=["download", "fullscreen"],
            )
            status = gr.HTML(
                note("Drawn images carry their settings in the PNG."), elem_id="draw-status", padding=False
            )
            with gr.Row(elem_classes="tools"):
                stop = gr.Button("Stop", size="sm", min_width=90, interactive=False)
                download = gr.DownloadButton("Download with settings", size="sm", min_width=90, interactive=False)

    async def draw(prompt: Sequence[str | np.ndarray], count: object, *values: object) -> AsyncIterator[tuple]:
        settings, wanted = draw_settings(*values), whole(count, "images")
        engine.limits.check("images", wanted, 1, engine.limits.drawings)
        seeds = [dataclasses.replace(settings, seed=settings.seed + number) for number in range(wanted)]
        nothing = gr.DownloadButton(value=None, interactive=False)
        yield [], progress(WAITING), gr.Button(interactive=True), nothing
        results: list[GeneratedImage] = []
        async with contextlib.aclosing(draw_all(engine, prompt, seeds)) as events:
            async for event in events:
                if isinstance(event, list):
                    results = event
                else:
                    made, calls = event
                    words = f"Step {made} of {calls}" if calls else WAITING
                    yield gr.skip(), progress(words, made, calls), gr.skip(), gr.skip()
        paths, archive = await asyncio.to_thread(save, name, prompt, seeds, results)
        flagged = sum(bool(result.flagged) for result in results)
        black = f" {flagged} of them black: the safety checker flagged it." if flagged else ""
        shown = [(path, f"seed {each.seed}") for path, each in zip(paths, seeds, strict=True)]
        yield (
            shown,
            note(f"{spell(settings, wanted)}.{black}"),
            gr.Button(interactive=False),
            gr.DownloadButton(value=archive, interactive=True),
        )

    async def from_words(words: object, *values: object) -> AsyncIterator[tuple]:
        prompt = text(words, engine).strip()
        if not prompt:
            raise UserError("the prompt is empty; say what to draw")
        async for update in draw([prompt], *values):
            yield update

    async def from_blend(images: list[tuple[str, Any]] | None, *values: object) -> AsyncIterator[tuple]:
        paths = [path for path, _ in images or ()]
        if not paths:
            raise UserError("there are no images to blend; add two or more")
        size = engine.plain.config.vision.image_size
        read = await asyncio.to_thread(read_images, paths, engine.limits, size)
        async for update in draw(read, *values):
            yield update

    async def from_rows(*values: object) -> AsyncIterator[tuple]:
        own, (words, *others) = rows.split(values)
        examples, words = await rows.read(own), text(words, engine).strip()
        if not words:
            raise UserError("the last text is empty; say what to draw")
        # Each text stands before its image, as in the pairs from which drawing is learned.
        prompt = [part for image, said in examples for part in (f" {said}", image)]
        async for update in draw([*prompt, f" {words}" if prompt else words], *others):
            yield update

    async def nothing_came() -> tuple:
        return note("Nothing was drawn."), gr.Button(interactive=False)

    settings, outputs = [count, *controls.inputs], [gallery, status, stop, download]
    drawing = [
        by_words.click(told(from_words), [words, *settings], outputs, **EVENT),
        words.submit(told(from_words), [words, *settings], outputs, **EVENT),
        by_blend.click(told(from_blend), [blend.gallery, *settings], outputs, **EVENT),
        by_rows.click(told(from_rows), [*rows.inputs, last, *settings], outputs, **EVENT),
    ]
    for event in drawing:
        event.failure(nothing_came, None, [status, stop], **EVENT)
    stop.click(nothing_came, None, [status, stop], cancels=drawing, **EVENT)


class _Blend:
    """Images in an order that a person changes: one is chosen, and moves to the front or to the back."""

    def __init__(self, samples: list[Sample]):
        gr.HTML(note("The model reads them in this order; choose one to move or remove it."), padding=False)
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
        chosen = gr.State(None)
        with gr.Row(elem_classes="tools"):
            earlier = gr.Button("◀ Earlier", size="sm", min_width=80)
            later = gr.Button("Later ▶", size="sm", min_width=80)
            remove = gr.Button("Remove", size="sm", min_width=80)
        gr.Examples(
            [[[samples[2].path, samples[6].path]], [[samples[4].path, samples[1].path, samples[9].path]]],
            self.gallery,
            label="Images that training has not seen",
        )

        async def choose(event: gr.SelectData) -> int:
            return event.index

        def mover(by: int):
            async def move(images: list | None, place: int | None) -> tuple:
                images = list(images or ())
                if place is None or not 0 <= place < len(images):
                    gr.Warning("Choose one of the images first.")
                    return gr.skip(), place
                to = min(max(place + by, 0), len(images) - 1)
                images.insert(to, images.pop(place))
                return gr.Gallery(value=numbered(images), selected_index=to), to

            return move

        async def drop(images: list | None, place: int | None) -> tuple:
            images = list(images or ())
            if place is None or not 0 <= place < len(images):
                gr.Warning("Choose one of the images first.")
                return gr.skip(), place
            del images[place]
            return gr.Gallery(value=numbered(images), selected_index=None), None

        self.gallery.select(choose, None, chosen, **EVENT)
        both = [self.gallery, chosen]
        earlier.click(mover(-1), both, both, **EVENT)
        later.click(mover(1), both, both, **EVENT)
        remove.click(drop, both, both, **EVENT)


def numbered(images: Sequence[tuple[str, Any]]) -> list[tuple[str, str]]:
    """Images with their places as captions."""
    return [(path, str(number)) for number, (path, _) in enumerate(images, 1)]


async def draw_all(
    engine: Engine, prompt: Sequence[str | np.ndarray], seeds: Sequence[DrawSettings]
) -> AsyncIterator[tuple[int, int] | list[GeneratedImage]]:
    """Draws a prompt with several settings at a time: (calls made, in all) while it goes on, then all images."""
    engine.limits.check_images(sum(not isinstance(part, str) for part in prompt))
    tickets: list[Ticket] = []
    made: dict[int, tuple[int, int]] = {}

    async def follow(number: int, ticket: Ticket) -> GeneratedImage:
        async for event in ticket:
            made[number] = event
        return await ticket.result()

    tasks: list[asyncio.Task] = []
    try:
        for settings in seeds:
            tickets.append(await engine.draw(prompt, settings))
        tasks = [asyncio.create_task(follow(*item)) for item in enumerate(tickets)]
        while pending := [task for task in tasks if not task.done()]:
            await asyncio.wait(pending, timeout=TELL_EVERY)
            calls = max((calls for _, calls in made.values()), default=0)
            yield sum(count for count, _ in made.values()), calls * len(tickets)
        yield [task.result() for task in tasks]
    finally:
        for ticket in tickets:
            ticket.cancel()
        for task in tasks:
            task.cancel()


def spell(settings: DrawSettings, count: int) -> str:
    """Settings in a line."""
    seeds = f"seed {settings.seed}" if count == 1 else f"seeds {settings.seed} to {settings.seed + count - 1}"
    return f"{settings.sampler}, {settings.steps} steps, guidance {settings.guidance:g}, {seeds}"


def save(
    name: str, prompt: Sequence[str | np.ndarray], seeds: Sequence[DrawSettings], results: Sequence[GeneratedImage]
) -> tuple[list[str], str]:
    """Drawn images as PNG files, and all of it as a zip: their paths."""
    record = Record()
    said: dict[str, Any] = {"model": name, "kind": "drawing", "prompt": record.parts(prompt), "drawings": []}
    paths = []
    for number, (settings, result) in enumerate(zip(seeds, results, strict=True), 1):
        content = drawn_png(result, prompt, settings)
        paths.append(write(f"drawing-seed-{settings.seed}.png", content))
        file = record.add(f"drawing-{number}.png", content)
        said["drawings"].append({"file": file, "flagged": result.flagged, "settings": dataclasses.asdict(settings)})
    return paths, record.save("drawing", said)
