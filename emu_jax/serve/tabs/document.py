"""A document that a person begins with texts and images, and the model goes on with in texts and images."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator
from typing import Any

import gradio as gr

from emu_jax.errors import UserError
from emu_jax.generate.chat import Video
from emu_jax.generate.model import GeneratedImage
from emu_jax.serve.document import IMAGE, TEXT, Drawn, Piece, Plan, continue_document
from emu_jax.serve.downloads import Part, Record, figures, html_page, write
from emu_jax.serve.engine import Engine
from emu_jax.serve.tabs.controls import (
    EVENT,
    DrawControls,
    always,
    beating,
    draw_settings,
    note,
    progress,
    text,
    told,
    whole,
)
from emu_jax.serve.tabs.samples import Sample
from emu_jax.serve.uploads import read_uploads

EMPTY = (
    '<div class="blank"><b>An empty page</b><br>Add texts and images below; then let the model go on with them.</div>'
)
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
      parts: what it holds, as the model reads it and as it was drawn. own: how many of them the person began with.
      settings: of what came after.
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
            coming = gr.HTML("", elem_id="coming", elem_classes="paper", padding=False)
            box = gr.MultimodalTextbox(
                show_label=False,
                elem_id="add",
                placeholder="Add a text or images to the document",
                file_types=["image"],
                file_count="multiple",
                max_plain_text_length=engine.limits.text_characters,
                sources=["upload"],
                submit_btn="Add",
            )
            with gr.Row(elem_classes="tools"):
                go = gr.Button("Continue", variant="primary", size="sm", min_width=100, elem_id="go")
                stop = gr.Button("Stop", size="sm", min_width=70, interactive=False)
                undo = gr.Button("Take back", size="sm", min_width=90)
                clear = gr.Button("Clear", size="sm", min_width=70)
            status = gr.HTML(note(""), elem_id="document-status", padding=False)
            with gr.Row(elem_classes="tools"):
                as_html = gr.DownloadButton("Download as HTML", size="sm", min_width=130, interactive=False)
                as_zip = gr.DownloadButton("Download all (zip)", size="sm", min_width=130, interactive=False)
            gr.Examples(
                [
                    [{"text": "", "files": [samples[3].path]}],
                    [{"text": samples[0].name, "files": []}],
                    [{"text": samples[4].name, "files": [samples[4].path]}],
                ],
                box,
                label="Beginnings (add one, then continue)",
                elem_id="beginnings",
            )
        with gr.Column(scale=1, min_width=260), gr.Accordion("Settings", open=True):
            order = gr.Dropdown(list(orders), value=usual, label="What comes")
            items = gr.Slider(
                1, engine.limits.items, min(2, engine.limits.items), step=1, label="Items", info="At most"
            )
            most = min(engine.limits.new_tokens, engine.plain.config.llama.context)
            tokens = gr.Slider(1, most, min(32, most), step=1, label="New tokens", info="Of a text, at most")
            controls = DrawControls.show(engine) if engine.draws else None

    async def downloads(page: Page) -> tuple:
        if not page.parts:
            return tuple(gr.DownloadButton(value=None, interactive=False) for _ in range(2))
        paths = await asyncio.to_thread(save, name, page)
        return tuple(gr.DownloadButton(value=path, interactive=True) for path in paths)

    async def add(page: Page, asked: dict[str, Any]) -> AsyncIterator[tuple]:
        """Files first, then the text, as the box shows them."""
        said, files = text(asked.get("text"), engine).strip(), asked.get("files") or ()
        if not said and not files:
            raise UserError("there is nothing to add; write a text, or choose an image")
        size = engine.plain.config.vision.image_size
        read = await asyncio.to_thread(read_uploads, files, engine.limits, size)
        parts = (*page.parts, *read, *([said] if said else []))
        engine.limits.check_text(*(part for part in parts if isinstance(part, str)))
        engine.limits.check_images(sum(not isinstance(part, str) for part in parts))
        page = dataclasses.replace(page, parts=parts, own=len(parts))
        yield await asyncio.to_thread(figures, parts), "", page, gr.MultimodalTextbox(value=None), note("")

    async def go_on(page: Page, order: object, items: object, tokens: object, *drawing: object) -> AsyncIterator[tuple]:
        if not page.parts:
            raise UserError("the document is empty; add a text or an image to begin with")
        if order not in orders:
            raise UserError(f"order {order!r} is unknown; choose one of {', '.join(orders)}")
        count, kinds = whole(items, "items"), orders[order]
        engine.limits.check("items", count, 1, engine.limits.items)
        pattern = None if kinds is None else tuple(kinds[number % len(kinds)] for number in range(count))
        plan = Plan(count, pattern, whole(tokens, "max_tokens"), *([draw_settings(*drawing)] if drawing else []))
        page = dataclasses.replace(page, settings=dataclasses.asdict(plan))
        written = ""
        yield gr.skip(), progress("Waiting for a place …"), page, note(""), gr.Button(interactive=True)
        async with contextlib.aclosing(beating(continue_document(engine, as_prompt(page), plan))) as events:
            async for event in events:
                if event is None:
                    yield tuple(gr.skip() for _ in range(5))
                elif isinstance(event, Drawn):
                    bar = progress(f"Drawing: step {event.made} of {event.calls}", event.made, event.calls)
                    yield gr.skip(), bar, gr.skip(), gr.skip(), gr.skip()
                elif isinstance(event, Piece):
                    written += event.text
                    yield gr.skip(), figures([written]), gr.skip(), gr.skip(), gr.skip()
                else:
                    written = ""
                    page = dataclasses.replace(page, parts=(*page.parts, event.content))
                    yield await asyncio.to_thread(figures, page.parts), "", page, gr.skip(), gr.skip()
        came = len(page.parts) - page.own
        ended = "" if came >= count else ": the model has nothing more to say"
        yield gr.skip(), "", page, note(f"{came} items since your last own{ended}"), gr.Button(interactive=False)

    async def rest(page: Page) -> tuple:
        return "", gr.Button(interactive=False), *await downloads(page)

    async def take_back(page: Page) -> tuple:
        parts = page.parts[:-1]
        page = dataclasses.replace(page, parts=parts, own=min(page.own, len(parts)))
        return figures(parts) or EMPTY, page, note("")

    async def forget() -> tuple:
        return EMPTY, Page(), note("")

    resting = [coming, stop, as_html, as_zip]
    inputs = [document, order, items, tokens, *(controls.inputs if controls else [])]
    going = go.click(told(go_on), inputs, [paper, coming, document, status, stop], **EVENT)
    always(going, rest, document, resting)
    adding = box.submit(told(add), [document, box], [paper, coming, document, box, status], cancels=going, **EVENT)
    adding.success(rest, document, resting, **EVENT)
    stop.click(rest, document, resting, cancels=going, **EVENT)
    for button, change, given in ((undo, take_back, document), (clear, forget, None)):
        changed = button.click(change, given, [paper, document, status], cancels=going, **EVENT)
        changed.success(rest, document, resting, **EVENT)


def offered(draws: bool, begins_images: bool) -> dict[str, tuple[str, ...] | None]:
    """The orders that a model can follow; one that has not learnt to begin images would decide for one text, always."""
    possible = {order: kinds for order, kinds in ORDERS.items() if draws or (kinds and IMAGE not in kinds)}
    return {order: kinds for order, kinds in possible.items() if begins_images or kinds}


def as_prompt(page: Page) -> list:
    """What the model reads: drawn images as the images they are, videos as their frames."""
    prompt: list = []
    for part in page.parts:
        if isinstance(part, Video):
            prompt += part.source
        else:
            prompt.append(part.image if isinstance(part, GeneratedImage) else part)
    return prompt


def save(name: str, page: Page) -> tuple[str, str]:
    """A document as an HTML file and as a zip: their paths."""
    record = Record()
    said = {"model": name, "kind": "document", "parts": record.parts(page.parts), "own": page.own}
    said["settings"] = page.settings
    begun = write("document.html", html_page(f"A document by {name}", page.parts, said))
    record.add("document.html", html_page(f"A document by {name}", page.parts, said).encode())
    return begun, record.save("document", said)
