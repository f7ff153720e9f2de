"""Few-shot prompts: rows of an image and its text, then an image for which the model writes the text."""

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
from emu_jax.serve.downloads import Archive
from emu_jax.serve.encoded_prompt import (
    ASSISTANT_ROLE,
    USER_ROLE,
    EncodedPrompt,
    Message,
    encode_continuation,
    encode_conversation,
)
from emu_jax.serve.engine import Completion, Engine
from emu_jax.serve.settings import TextSettings
from emu_jax.serve.tabs.controls import (
    EVENT,
    length,
    note,
    offer,
    progress,
    text,
    text_controls,
    text_settings,
    with_errors,
    with_heartbeat,
)
from emu_jax.serve.tabs.rows import Rows, image
from emu_jax.serve.tabs.samples import Sample
from emu_jax.serve.ticket import Ticket
from emu_jax.serve.uploads import read_images

CHAT = "turns of a chat"
FORMS: dict[str, prompts.Prompt | None] = {
    CHAT: None,
    "plain: image, text": prompts.embedded,
    "the paper's captions": prompts.caption,
    "the paper's questions": prompts.vqa,
}
EMPTY = '<div class="blank">Fill in a row and the query image: the prompt appears here, token by token.</div>'


def show(engine: Engine, name: str, samples: list[Sample]) -> None:
    """Adds the tab's content."""
    with gr.Row(equal_height=False):
        with gr.Column(scale=1, min_width=320):
            gr.HTML(note("Examples: an image, and its text"), padding=False)
            rows = Rows(engine, count=6, first=2, label="Text", placeholder="the answer for this image")
            gr.HTML(note("Query image: the model writes its text"), padding=False)
            with gr.Row(elem_classes="example", equal_height=True):
                query = image("Query image")
                question = gr.Textbox(
                    label="Question",
                    info="Also for the examples; may be empty",
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
            given = gr.Examples(
                [
                    [samples[1].path, samples[1].name, samples[6].path, samples[6].name, samples[0].path, ""],
                    [samples[4].path, samples[4].thing, samples[7].path, samples[7].thing, samples[2].path, ""],
                ],
                [rows.images[0], rows.texts[0], rows.images[1], rows.texts[1], query, question],
                label="Examples, with images that were not in the training set: one click answers",
                elem_id="few-shot-examples",
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
                controls = text_controls(engine, new_tokens=24)

    async def read(values: Sequence[object]) -> tuple[FewShotPrompt, Sequence[object]]:
        """An event's values -> the prompt, and the remaining values."""
        own, (path, question, form, *others) = rows.split(values)
        examples = await rows.read(own)
        if not path:
            raise UserError("the query image is missing; choose one")
        if form not in forms:
            raise UserError(f"form {form!r} is unknown; choose one of {', '.join(forms)}")
        (shown,) = await read_images(engine, [path])
        return build(form, examples, shown, text(question, engine).strip()), others

    async def preview(*values: object) -> str:
        """Shows the prompt; while the form is incomplete, what is missing is no error."""
        try:
            prompt, _ = await read(values)
            encoded = await asyncio.to_thread(prompt.encode, engine)
        except UserError as error:
            return EMPTY if not any(values[1:-3]) else f'<div class="blank">{html.escape(str(error))}</div>'
        return show_tokens(engine, encoded)

    async def run(*values: object) -> AsyncIterator[tuple]:
        prompt, others = await read(values)
        settings = text_settings(*others)
        yield "", progress("Waiting for a free slot …"), gr.Button(interactive=True), offer()
        ticket = await prompt.submit(engine, settings)
        answered = ""
        try:
            async for piece in with_heartbeat(ticket):
                answered += piece or ""
                yield answered if piece else gr.skip(), gr.skip(), gr.skip(), gr.skip()
            completion = await ticket.result()
        finally:
            ticket.cancel()
        archive = Archive()
        recorded = {
            "model": name,
            "kind": "few-shot",
            "prompt": archive.parts(prompt.parts()),
            "form": values[-5],
            "answer": completion.text,
            "settings": dataclasses.asdict(settings),
        }
        path = await asyncio.to_thread(archive.save, "few-shot", recorded)
        yield completion.text.strip(), note(length(completion)), gr.Button(interactive=False), offer(path)

    async def idle() -> tuple:
        return note(""), gr.Button(interactive=False)

    fields = [*rows.inputs, query, question, form]
    inputs, outputs = [*fields, *controls], [answer, status, stop, download]
    running = [
        go.click(with_errors(run), inputs, outputs, **EVENT),
        given.load_input_event.success(with_errors(run), inputs, outputs, **EVENT),
    ]
    for event in running:
        event.failure(idle, None, [status, stop], **EVENT)
    stop.click(idle, None, [status, stop], cancels=running, **EVENT)
    for field in fields:
        field.change(preview, fields, exact, trigger_mode="always_last", **EVENT)


@dataclasses.dataclass(frozen=True)
class FewShotPrompt:
    """A prompt to continue, or a conversation to answer."""

    prompt: tuple[str | np.ndarray, ...] = ()
    messages: tuple[Message, ...] = ()

    def encode(self, engine: Engine) -> EncodedPrompt:
        """The prompt as tokens."""
        if self.messages:
            return encode_conversation(engine.plain, self.messages)
        return encode_continuation(engine.plain, self.prompt)

    async def submit(self, engine: Engine, settings: TextSettings) -> Ticket[str, Completion]:
        """Sends the request to the engine."""
        if self.messages:
            return await engine.chat(self.messages, settings)
        return await engine.complete(self.prompt, settings)

    def parts(self) -> list[str | np.ndarray]:
        """All texts and images in order."""
        return [part for message in self.messages for part in message.parts] or list(self.prompt)


def build(form: str, examples: Sequence[tuple[np.ndarray, str]], shown: np.ndarray, question: str) -> FewShotPrompt:
    """Rows and an image -> a prompt in the form of the benchmarks (`evaluate/prompts.py`)."""
    prompt = FORMS[form]
    if prompt is None:
        messages: list[Message] = []
        for seen, label in examples:
            messages += [Message(USER_ROLE, (seen, question or NAME_ASKS[0])), Message(ASSISTANT_ROLE, (label,))]
        return FewShotPrompt(messages=(*messages, Message(USER_ROLE, (shown, question or NAME_ASKS[0]))))
    if prompt is prompts.vqa and not (question and examples):
        raise UserError("this form needs an example and a question; fill them in")
    if prompt is prompts.embedded:
        question = question or NAME_ASKS[0]  # not used: the prompt of this form is only the image
    few_shot = [
        (Question(str(number), text=question, answers=(label,)), [seen])
        for number, (seen, label) in enumerate(examples)
    ]
    return FewShotPrompt(next(prompt(Question("asked", text=question), [shown], few_shot, False)).parts)


def show_tokens(engine: Engine, prompt: EncodedPrompt) -> str:
    """The tokens of a prompt as HTML: special tokens by name, runs of <image> as a count."""
    tokenizer, parts = engine.plain.tokenizer, []
    special, queries, images = tokenizer.special, engine.plain.config.causal.queries, 0
    words: list[int] = []

    def flush() -> None:
        if words:
            parts.append(html.escape("".join(piece for _, piece in tokenizer.pieces(words))))
            words.clear()

    for id, index in zip(prompt.tokens.tolist(), prompt.embedding_index.tolist(), strict=True):
        if index >= 0:
            if index % queries == 0:
                flush()
                images += 1
                parts.append(f'<span class="token">&lt;image&gt; × {queries}</span>')
        elif id in special:
            flush()
            parts.append(f'<span class="token">{html.escape(special[id])}</span>')
        else:
            words.append(id)
    flush()
    context = engine.plain.config.llama.context
    count = f"{len(prompt.tokens)} of {context} tokens of the context, {images} images"
    return f'<div class="exact">{" ".join(parts)}</div>{note(count)}'
