"""Prompts of examples: rows of a picture and its text, then a picture to be told about in the same way."""

from __future__ import annotations

import asyncio
import dataclasses
import html
from collections.abc import AsyncIterator, Sequence

import gradio as gr
import numpy as np

from emu_jax.data.embedded_chats import NAME_ASKS
from emu_jax.errors import UserError
from emu_jax.evaluate import prompts
from emu_jax.evaluate.question import Question
from emu_jax.serve import sequences
from emu_jax.serve.downloads import Record
from emu_jax.serve.engine import Engine
from emu_jax.serve.tabs.controls import EVENT, TextControls, beating, note, progress, text, text_settings, told
from emu_jax.serve.tabs.rows import Rows, picture
from emu_jax.serve.tabs.samples import Sample
from emu_jax.serve.uploads import read_pictures

FORMS: dict[str, tuple[prompts.Prompt, bool]] = {  # and whether it takes a question
    "plain: picture, text": (prompts.embedded, True),
    "the paper's captions": (prompts.caption, False),
    "the paper's questions": (prompts.vqa, True),
}
EMPTY = '<div class="blank">Fill in a row and the last picture: the prompt appears here, token for token.</div>'


def show(engine: Engine, name: str, samples: list[Sample]) -> None:
    """Adds the tab's content."""
    with gr.Row(equal_height=False):
        with gr.Column(scale=1, min_width=320):
            rows = Rows(
                engine, count=6, first=2, label="Text", placeholder="what the model should say of such a picture"
            )
            with gr.Row(elem_classes="example", equal_height=True):
                asked = picture("Asked about")
                question = gr.Textbox(
                    label="Question",
                    info="Of the examples as well; may be empty",
                    lines=2,
                    scale=2,
                    min_width=150,
                    elem_id="few-shot-question",
                )
            form = gr.Dropdown(list(FORMS), value=next(iter(FORMS)), label="Form of the prompt")
            with gr.Row(elem_classes="tools"):
                go = gr.Button("Answer", variant="primary", size="sm", elem_id="few-shot-go", min_width=100)
                stop = gr.Button("Stop", size="sm", min_width=70, interactive=False)
            gr.Examples(
                [
                    [samples[1].path, samples[1].name, samples[6].path, samples[6].name, samples[0].path, ""],
                    [samples[4].path, samples[4].thing, samples[7].path, samples[7].thing, samples[2].path, ""],
                ],
                [rows.pictures[0], rows.texts[0], rows.pictures[1], rows.texts[1], asked, question],
                label="Examples, with pictures that training has not seen",
                example_labels=[
                    f"names: {samples[1].thing}, {samples[6].thing}, then a {samples[0].thing}",
                    f"without skin tones: {samples[4].thing}, {samples[7].thing}, then a {samples[2].thing}",
                ],
            )
        with gr.Column(scale=1, min_width=320):
            answer = gr.Textbox(label="Answer", lines=2, max_lines=8, interactive=False, elem_id="few-shot-answer")
            status = gr.HTML(note(""), elem_id="few-shot-status", padding=False)
            download = gr.DownloadButton("Download with prompt and settings", size="sm", interactive=False)
            exact = gr.HTML(EMPTY, elem_id="exact", elem_classes="paper", padding=False)
            with gr.Accordion("Settings", open=False):
                controls = TextControls.show(engine, new_tokens=24)

    async def read(values: Sequence[object]) -> tuple[tuple, Sequence[object]]:
        """An event's values -> the prompt, and the values that are left."""
        own, (path, question, form, *others) = rows.split(values)
        examples = await rows.read(own)
        if not path:
            raise UserError("the last picture is missing; choose the one to be told about")
        if form not in FORMS:
            raise UserError(f"form {form!r} is unknown; choose one of {', '.join(FORMS)}")
        size = engine.plain.config.vision.image_size
        (shown,) = await asyncio.to_thread(read_pictures, [path], engine.limits, size)
        return build_prompt(form, examples, shown, text(question, engine).strip()), others

    async def preview(*values: object) -> str:
        """Is not told what is missing: the person is still at it."""
        try:
            prompt, _ = await read(values)
            sequence = await asyncio.to_thread(sequences.continuation, engine.plain, prompt)
        except UserError as error:
            return EMPTY if not any(values[1:-3]) else f'<div class="blank">{html.escape(str(error))}</div>'
        return spell(engine, sequence)

    async def go_on(*values: object) -> AsyncIterator[tuple]:
        prompt, others = await read(values)
        settings = text_settings(*others)
        nothing = gr.DownloadButton(value=None, interactive=False)
        yield "", progress("Waiting for a place …"), gr.Button(interactive=True), nothing
        ticket = await engine.write(prompt, settings)
        said = ""
        try:
            async for piece in beating(ticket):
                said += piece or ""
                yield said if piece else gr.skip(), gr.skip(), gr.skip(), gr.skip()
            written = await ticket.result()
        finally:
            ticket.cancel()
        record = Record()
        about = {"model": name, "kind": "few-shot", "prompt": record.parts(prompt), "answer": written.text}
        about["settings"] = dataclasses.asdict(settings)
        path = await asyncio.to_thread(record.save, "few-shot", about)
        ended = "" if written.ended else " (cut: the limit of new tokens is reached)"
        words = f"{written.new_tokens} tokens after a prompt of {written.prompt_tokens}{ended}"
        done = gr.Button(interactive=False)
        yield written.text.strip(), note(words), done, gr.DownloadButton(value=path, interactive=True)

    async def rest() -> tuple:
        return note(""), gr.Button(interactive=False)

    fields = [*rows.inputs, asked, question, form]
    going = go.click(told(go_on), [*fields, *controls.inputs], [answer, status, stop, download], **EVENT)
    going.failure(rest, None, [status, stop], **EVENT)
    stop.click(rest, None, [status, stop], cancels=going, **EVENT)
    for field in fields:
        field.change(preview, fields, exact, trigger_mode="always_last", **EVENT)


def build_prompt(
    form: str, examples: Sequence[tuple[np.ndarray, str]], shown: np.ndarray, question: str
) -> tuple[str | np.ndarray, ...]:
    """Rows and a picture -> what the model reads, as the benchmarks build it (`evaluate/prompts.py`)."""
    build, asks = FORMS[form]
    asked = question if asks else ""
    if build is prompts.embedded:
        asked = asked or NAME_ASKS  # whose prompt is the picture alone
    if build is prompts.vqa and not question:
        raise UserError("this form needs a question; write one")
    shots = [
        (Question(str(number), text=asked, answers=(said,)), [seen]) for number, (seen, said) in enumerate(examples)
    ]
    if build is prompts.vqa and not shots:
        raise UserError("this form needs an example; fill in a row")
    return next(build(Question("asked", text=asked), [shown], shots, False)).parts


def spell(engine: Engine, sequence: sequences.Sequence) -> str:
    """The sequence that the model reads as HTML: special tokens by name, runs of <image> counted, pictures drawn."""
    tokenizer, parts = engine.plain.tokenizer, []
    special, queries, seen = tokenizer.special, engine.plain.config.causal.queries, 0
    words: list[int] = []

    def flush() -> None:
        if words:
            parts.append(html.escape("".join(piece for _, piece in tokenizer.spell(words))))
            words.clear()

    for id, source in zip(sequence.tokens.tolist(), sequence.sources.tolist(), strict=True):
        if source >= 0:
            if source % queries == 0:
                flush()
                seen += 1
                parts.append(f'<span class="token">&lt;image&gt; × {queries}</span>')
        elif id in special:
            flush()
            parts.append(f'<span class="token">{html.escape(special[id])}</span>')
        else:
            words.append(id)
    flush()
    context = engine.plain.config.llama.context
    count = f"{len(sequence.tokens)} tokens of a context of {context}, {seen} pictures"
    return f'<div class="exact">{" ".join(parts)}</div>{note(count)}'
