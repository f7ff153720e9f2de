"""Prompts of examples: rows of an image and its text, then an image to be told about in the same way."""

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
from emu_jax.serve.engine import Engine, TextSettings, Ticket, Written
from emu_jax.serve.sequences import ASSISTANT_ROLE, USER_ROLE, Message
from emu_jax.serve.tabs.controls import EVENT, TextControls, beating, length, note, progress, text, text_settings, told
from emu_jax.serve.tabs.rows import Rows, image
from emu_jax.serve.tabs.samples import Sample
from emu_jax.serve.uploads import read_images

CHAT = "turns of a chat"
FORMS: dict[str, prompts.Prompt | None] = {
    CHAT: None,
    "plain: image, text": prompts.embedded,
    "the paper's captions": prompts.caption,
    "the paper's questions": prompts.vqa,
}
EMPTY = '<div class="blank">Fill in a row and the last image: the prompt appears here, token for token.</div>'


def show(engine: Engine, name: str, samples: list[Sample]) -> None:
    """Adds the tab's content."""
    with gr.Row(equal_height=False):
        with gr.Column(scale=1, min_width=320):
            gr.HTML(note("Examples: an image, and what is said of it"), padding=False)
            rows = Rows(
                engine, count=6, first=2, label="Text", placeholder="what the model should say of such an image"
            )
            gr.HTML(note("The image that is asked about"), padding=False)
            with gr.Row(elem_classes="example", equal_height=True):
                query = image("The image that is asked about")
                question = gr.Textbox(
                    label="Question",
                    info="Of the examples as well; may be empty",
                    lines=2,
                    scale=2,
                    min_width=150,
                    elem_id="few-shot-question",
                )
            forms = [form for form in FORMS if engine.chats or form != CHAT]
            form = gr.Dropdown(forms, value=forms[0], label="Form of the prompt")
            with gr.Row(elem_classes="tools"):
                go = gr.Button("Answer", variant="primary", size="sm", elem_id="few-shot-go", min_width=100)
                stop = gr.Button("Stop", size="sm", min_width=70, interactive=False)
            gr.Examples(
                [
                    [samples[1].path, samples[1].name, samples[6].path, samples[6].name, samples[0].path, ""],
                    [samples[4].path, samples[4].thing, samples[7].path, samples[7].thing, samples[2].path, ""],
                ],
                [rows.images[0], rows.texts[0], rows.images[1], rows.texts[1], query, question],
                label="Examples, with images that training has not seen",
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

    async def read(values: Sequence[object]) -> tuple[Asked, Sequence[object]]:
        """An event's values -> what is asked, and the values that are left."""
        own, (path, question, form, *others) = rows.split(values)
        examples = await rows.read(own)
        if not path:
            raise UserError("the last image is missing; choose the one to be told about")
        if form not in forms:
            raise UserError(f"form {form!r} is unknown; choose one of {', '.join(forms)}")
        size = engine.plain.config.vision.image_size
        (shown,) = await asyncio.to_thread(read_images, [path], engine.limits, size)
        return build(form, examples, shown, text(question, engine).strip()), others

    async def preview(*values: object) -> str:
        """Is not told what is missing: the person is still at it."""
        try:
            asked, _ = await read(values)
            sequence = await asyncio.to_thread(asked.sequence, engine)
        except UserError as error:
            return EMPTY if not any(values[1:-3]) else f'<div class="blank">{html.escape(str(error))}</div>'
        return spell(engine, sequence)

    async def go_on(*values: object) -> AsyncIterator[tuple]:
        asked, others = await read(values)
        settings = text_settings(*others)
        nothing = gr.DownloadButton(value=None, interactive=False)
        yield "", progress("Waiting for a place …"), gr.Button(interactive=True), nothing
        ticket = await asked.submit(engine, settings)
        said = ""
        try:
            async for piece in beating(ticket):
                said += piece or ""
                yield said if piece else gr.skip(), gr.skip(), gr.skip(), gr.skip()
            written = await ticket.result()
        finally:
            ticket.cancel()
        record = Record()
        about = {
            "model": name,
            "kind": "few-shot",
            "prompt": record.parts(asked.parts()),
            "form": values[-5],
            "answer": written.text,
        }
        about["settings"] = dataclasses.asdict(settings)
        path = await asyncio.to_thread(record.save, "few-shot", about)
        done = gr.Button(interactive=False)
        yield written.text.strip(), note(length(written)), done, gr.DownloadButton(value=path, interactive=True)

    async def rest() -> tuple:
        return note(""), gr.Button(interactive=False)

    fields = [*rows.inputs, query, question, form]
    going = go.click(told(go_on), [*fields, *controls.inputs], [answer, status, stop, download], **EVENT)
    going.failure(rest, None, [status, stop], **EVENT)
    stop.click(rest, None, [status, stop], cancels=going, **EVENT)
    for field in fields:
        field.change(preview, fields, exact, trigger_mode="always_last", **EVENT)


@dataclasses.dataclass(frozen=True)
class Asked:
    """What the model is asked: a prompt to be continued, or a conversation to be answered."""

    prompt: tuple[str | np.ndarray, ...] = ()
    messages: tuple[Message, ...] = ()

    def sequence(self, engine: Engine) -> sequences.Sequence:
        """As the model reads it."""
        if self.messages:
            return sequences.conversation(engine.plain, self.messages)
        return sequences.continuation(engine.plain, self.prompt)

    async def submit(self, engine: Engine, settings: TextSettings) -> Ticket[str, Written]:
        """Asks."""
        if self.messages:
            return await engine.chat(self.messages, settings)
        return await engine.write(self.prompt, settings)

    def parts(self) -> list[str | np.ndarray]:
        """All of it, in order."""
        return [part for message in self.messages for part in message.parts] or list(self.prompt)


def build(form: str, examples: Sequence[tuple[np.ndarray, str]], shown: np.ndarray, question: str) -> Asked:
    """Rows and an image -> what the model is asked, as the benchmarks ask (`evaluate/prompts.py`)."""
    prompt = FORMS[form]
    if prompt is None:
        messages: list[Message] = []
        for seen, said in examples:
            messages += [Message(USER_ROLE, (seen, question or NAME_ASKS)), Message(ASSISTANT_ROLE, (said,))]
        return Asked(messages=(*messages, Message(USER_ROLE, (shown, question or NAME_ASKS))))
    if prompt is prompts.vqa and not (question and examples):
        raise UserError("this form needs an example and a question; fill them in")
    if prompt is prompts.embedded:
        question = question or NAME_ASKS  # whose prompt is the image alone
    shots = [
        (Question(str(number), text=question, answers=(said,)), [seen]) for number, (seen, said) in enumerate(examples)
    ]
    return Asked(next(prompt(Question("asked", text=question), [shown], shots, False)).parts)


def spell(engine: Engine, sequence: sequences.Sequence) -> str:
    """The sequence that the model reads as HTML: special tokens by name, runs of <image> counted, images drawn."""
    tokenizer, parts = engine.plain.tokenizer, []
    special, queries, seen = tokenizer.special, engine.plain.config.causal.queries, 0
    words: list[int] = []

    def flush() -> None:
        if words:
            parts.append(html.escape("".join(piece for _, piece in tokenizer.pieces(words))))
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
    count = f"{len(sequence.tokens)} tokens of a context of {context}, {seen} images"
    return f'<div class="exact">{" ".join(parts)}</div>{note(count)}'
