"""A document: the user begins it with texts and images, and the model continues it with texts and images."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator
from typing import Any

import gradio as gr

from emu_jax.data.tokenizer import PlainText
from emu_jax.errors import UserError
from emu_jax.generate.decoder import GeneratedImage
from emu_jax.generate.document import IMAGE, TEXT
from emu_jax.generate.messages import Video
from emu_jax.serve.document import DocumentSettings, DrawingProgress, TextPiece, continue_document
from emu_jax.serve.downloads import Archive, Part, figures, html_page, write
from emu_jax.serve.engine import Engine
from emu_jax.serve.tabs.controls import (
    EVENT,
    always,
    draw_controls,
    draw_settings,
    new_tokens_slider,
    note,
    offer,
    progress,
    text,
    upload_box,
    whole,
    with_errors,
    with_heartbeat,
)
from emu_jax.serve.tabs.samples import Sample
from emu_jax.serve.uploads import read_uploads

EMPTY = '<div class="blank"><b>An empty page</b><br>Add texts and images below, then let the model continue.</div>'
MODEL_DECIDES = "the model decides"
ORDERS = {
    MODEL_DECIDES: None,
    "text, image, …": (TEXT, IMAGE),
    "image, text, …": (IMAGE, TEXT),
    "texts only": (TEXT,),
    "images only": (IMAGE,),
}


@dataclasses.dataclass(frozen=True)
class Page:
    """A document so far.

    Attributes:
      parts: texts and images.
      own: number of parts up to the last one that the user added.
      settings: settings of the items after those.
    """

    parts: tuple[Part | GeneratedImage, ...] = ()
    own: int = 0
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)


def show(engine: Engine, name: str, samples: list[Sample]) -> None:
    """Adds the tab's content."""
    document = gr.State(Page())
    orders = offered(engine.draws, engine.plain.config.learn_image_token)
    usual = next(order for order in orders if order != MODEL_DECIDES)
    with gr.Row(equal_height=False):
        with gr.Column(scale=3, min_width=320):
            paper = gr.HTML(EMPTY, elem_id="paper", elem_classes="paper", padding=False)
            preview = gr.HTML("", elem_id="preview", elem_classes="paper", padding=False)
            box = upload_box(engine, "add", "Add text or images to the document", ["image"], submit_btn="Add")
            with gr.Row(elem_classes="tools"):
                go = gr.Button("Continue", variant="primary", size="sm", min_width=100, elem_id="go")
                stop = gr.Button("Stop", size="sm", min_width=70, interactive=False)
                undo = gr.Button("Take back", size="sm", min_width=90)
                clear = gr.Button("Clear", size="sm", min_width=70)
            status = gr.HTML(note(""), elem_id="document-status", padding=False)
            with gr.Row(elem_classes="tools"):
                as_html = gr.DownloadButton("Download as HTML", size="sm", min_width=130, interactive=False)
                as_zip = gr.DownloadButton("Download all (zip)", size="sm", min_width=130, interactive=False)
            examples = gr.Examples(
                [
                    [{"text": "", "files": [samples[3].path]}],
                    [{"text": samples[0].name, "files": []}],
                    [{"text": samples[4].name, "files": [samples[4].path]}],
                ],
                box,
                label="Examples: one click adds it and continues",
                elem_id="document-examples",
            )
        with gr.Column(scale=1, min_width=260), gr.Accordion("Settings", open=True):
            order = gr.Dropdown(list(orders), value=usual, label="New items")
            items = gr.Slider(
                1, engine.limits.items, min(2, engine.limits.items), step=1, label="Number of items", info="Maximum"
            )
            tokens = new_tokens_slider(engine, 32, "Maximum per text")
            controls = draw_controls(engine) if engine.draws else []

    async def downloads(page: Page) -> tuple:
        paths = await asyncio.to_thread(save, name, page) if page.parts else (None, None)
        return tuple(offer(path) for path in paths)

    async def add(page: Page, entry: dict[str, Any]) -> AsyncIterator[tuple]:
        """Adds files first, then the text, in the order of the box."""
        words, files = text(entry.get("text"), engine).strip(), entry.get("files") or ()
        if not words and not files:
            raise UserError("there is nothing to add; write a text, or choose an image")
        read = await read_uploads(engine, files)
        parts = (*page.parts, *read, *([words] if words else []))
        engine.limits.check_text(*(part for part in parts if isinstance(part, str)))
        engine.limits.check_images(sum(not isinstance(part, str) for part in parts))
        page = dataclasses.replace(page, parts=parts, own=len(parts))
        yield await asyncio.to_thread(figures, parts), "", page, gr.MultimodalTextbox(value=None), note("")

    async def run(page: Page, order: object, items: object, tokens: object, *drawing: object) -> AsyncIterator[tuple]:
        if not page.parts:
            raise UserError("the document is empty; add a text or an image to begin with")
        if order not in orders:
            raise UserError(f"order {order!r} is unknown; choose one of {', '.join(orders)}")
        count, kinds = whole(items, "items"), orders[order]
        engine.limits.check("items", count, 1, engine.limits.items)
        pattern = None if kinds is None else tuple(kinds[number % len(kinds)] for number in range(count))
        drawing_settings = [draw_settings(*drawing)] if drawing else []
        settings = DocumentSettings(count, pattern, whole(tokens, "max_tokens"), *drawing_settings)
        page = dataclasses.replace(page, settings=dataclasses.asdict(settings))
        new_text = ""
        yield gr.skip(), progress("Waiting for a free slot …"), page, note(""), gr.Button(interactive=True)
        async with contextlib.aclosing(with_heartbeat(continue_document(engine, as_prompt(page), settings))) as events:
            async for event in events:
                if event is None:
                    yield tuple(gr.skip() for _ in range(5))
                elif isinstance(event, DrawingProgress):
                    bar = progress(f"Drawing: step {event.made} of {event.calls}", event.made, event.calls)
                    yield gr.skip(), bar, gr.skip(), gr.skip(), gr.skip()
                elif isinstance(event, TextPiece):
                    new_text += event.text
                    yield gr.skip(), figures([new_text]), gr.skip(), gr.skip(), gr.skip()
                else:
                    new_text = ""
                    page = dataclasses.replace(page, parts=(*page.parts, event.content))
                    yield await asyncio.to_thread(figures, page.parts), "", page, gr.skip(), gr.skip()
        new = len(page.parts) - page.own
        ended = "" if new >= count else "; the model ended the document"
        yield gr.skip(), "", page, note(f"{new} new items{ended}"), gr.Button(interactive=False)

    async def idle(page: Page) -> tuple:
        return "", gr.Button(interactive=False), *await downloads(page)

    async def undo_part(page: Page) -> tuple:
        parts = page.parts[:-1]
        page = dataclasses.replace(page, parts=parts, own=min(page.own, len(parts)))
        return figures(parts) or EMPTY, page, note("")

    async def reset() -> tuple:
        return EMPTY, Page(), note("")

    idle_outputs = [preview, stop, as_html, as_zip]
    inputs = [document, order, items, tokens, *controls]
    outputs, added = [paper, preview, document, status, stop], [paper, preview, document, box, status]
    shown = examples.load_input_event.success(with_errors(add), [document, box], added, **EVENT)
    running = [go.click(with_errors(run), inputs, outputs, **EVENT)]
    running.append(shown.success(with_errors(run), inputs, outputs, **EVENT))
    for event in running:
        always(event, idle, document, idle_outputs)
    adding = box.submit(with_errors(add), [document, box], added, cancels=running, **EVENT)
    adding.success(idle, document, idle_outputs, **EVENT)
    stop.click(idle, document, idle_outputs, cancels=running, **EVENT)
    for button, change, given in ((undo, undo_part, document), (clear, reset, None)):
        changed = button.click(change, given, [paper, document, status], cancels=running, **EVENT)
        changed.success(idle, document, idle_outputs, **EVENT)


def offered(draws: bool, begins_images: bool) -> dict[str, tuple[str, ...] | None]:
    """The orders that a model supports. If it has not learnt to begin images, it cannot decide: it adds one text."""
    possible = {order: kinds for order, kinds in ORDERS.items() if draws or (kinds and IMAGE not in kinds)}
    return {order: kinds for order, kinds in possible.items() if begins_images or kinds}


def as_prompt(page: Page) -> list:
    """The model's prompt: drawn images as plain images, videos as their frames.

    Texts beside each other, which the page shows as paragraphs, are lines.
    """
    prompt: list = []
    for part in page.parts:
        if isinstance(part, Video):
            prompt += part.source
        elif isinstance(part, str) and prompt and isinstance(prompt[-1], str):
            prompt[-1] = PlainText(f"{prompt[-1]}\n{part}")
        else:
            prompt.append(part.image if isinstance(part, GeneratedImage) else part)
    return prompt


def save(name: str, page: Page) -> tuple[str, str]:
    """Saves a document as an HTML file and as a zip; returns their paths."""
    archive = Archive()
    recorded = {"model": name, "kind": "document", "parts": archive.parts(page.parts), "own": page.own}
    recorded["settings"] = page.settings
    content = html_page(f"A document by {name}", page.parts, recorded)
    archive.add("document.html", content.encode())
    return write("document.html", content), archive.save("document", recorded)
