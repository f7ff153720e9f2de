"""Chat about images and videos: answers stream, and can be stopped, regenerated and taken back.

Where the model begins an image in its answer, it is drawn.
"""

from __future__ import annotations

import asyncio
import dataclasses
import html
from collections.abc import AsyncIterator
from typing import Any

import gradio as gr

from emu_jax.data.embedded_chats import DRAW_ASKS, NAME_ASKS, TONE_ASKS
from emu_jax.errors import UserError
from emu_jax.generate.chat import UNDRAWN
from emu_jax.generate.decoder import GeneratedImage
from emu_jax.serve.downloads import Archive, png, write
from emu_jax.serve.encoded_prompt import ASSISTANT_ROLE, SYSTEM_ROLE, USER_ROLE, Message
from emu_jax.serve.engine import Engine
from emu_jax.serve.settings import DrawSettings
from emu_jax.serve.tabs.controls import (
    EVENT,
    always,
    length,
    note,
    offer,
    progress,
    text,
    text_controls,
    text_settings,
    upload_box,
    with_errors,
    with_heartbeat,
)
from emu_jax.serve.tabs.samples import Sample
from emu_jax.serve.uploads import read_uploads

EMPTY = """### Ask about an image
Add one or more images, or a short video, and ask a question. Every turn may have images. Some models
draw when asked to.
"""
NO_CHAT = """### This model does not chat
It was pretrained, but not tuned to follow instructions: it continues text and images (see the other tabs).

`emu-jax serve`, without a checkpoint, serves emu-mini, which chats. Of the published weights, `Emu-instruct.pt` chats.
"""


@dataclasses.dataclass(frozen=True)
class Turn:
    """One question and its answer so far.

    Attributes:
      question: text of the user.
      files: uploaded files, for the page.
      shown: the same images and videos, for the model.
      answer: None before its first piece.
      drawn: the image that ends the answer, for the model. drawn_file: the same, for the page.
      settings: settings of its decoding.
    """

    question: str
    files: tuple[str, ...]
    shown: tuple[Any, ...]
    answer: str | None = None
    drawn: GeneratedImage | None = None
    drawn_file: str = ""
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)


Conversation = tuple[Turn, ...]


def show(engine: Engine, name: str, samples: list[Sample]) -> None:
    """Adds the tab's content."""
    if not engine.chats:
        gr.Markdown(NO_CHAT, elem_classes="empty")
        return
    conversation = gr.State(())
    with gr.Row(equal_height=False):
        with gr.Column(scale=3, min_width=320):
            chatbot = gr.Chatbot(
                show_label=False,
                elem_id="chat",
                height="min(54vh, 540px)",
                placeholder=EMPTY,
                layout="bubble",
                buttons=["copy"],
                latex_delimiters=[],
                render_markdown=False,
                feedback_options=None,
            )
            box = upload_box(engine, "ask", "Ask about an image or a video", ["image", "video"])
            with gr.Row(elem_classes="tools"):
                retry = gr.Button("Ask again", size="sm", min_width=90)
                undo = gr.Button("Take back", size="sm", min_width=90)
                clear = gr.Button("Clear", size="sm", min_width=90)
                download = gr.DownloadButton("Download", size="sm", min_width=90, interactive=False)
            status = gr.HTML(note(""), elem_id="chat-status", padding=False)
            examples = gr.Examples(
                [
                    [{"text": NAME_ASKS[0], "files": [samples[1].path]}],
                    [{"text": TONE_ASKS, "files": [samples[6].path]}],
                    [{"text": f"yes or no, is this a {samples[2].thing}", "files": [samples[2].path]}],
                    *([[{"text": DRAW_ASKS[0].format(samples[0].name), "files": []}]] if engine.draws else []),
                ],
                box,
                label="Examples, with images that were not in the training set: one click asks",
                elem_id="chat-examples",
            )
        with gr.Column(scale=1, min_width=260), gr.Accordion("Settings", open=True):
            system = gr.Textbox(
                label="System message",
                info="Empty: the paper's message, if the first turn shows an image",
                lines=2,
                max_lines=6,
            )
            controls = text_controls(engine, new_tokens=64)

    def shown(turns: Conversation) -> list[dict[str, Any]]:
        messages = []
        for turn in turns:
            for file in turn.files:
                messages.append({"role": USER_ROLE, "content": {"path": file}})
            if turn.question:
                messages.append({"role": USER_ROLE, "content": html.escape(turn.question)})
            if turn.answer or (turn.answer is not None and not turn.drawn_file):
                messages.append({"role": ASSISTANT_ROLE, "content": html.escape(turn.answer)})
            if turn.drawn_file:
                messages.append({"role": ASSISTANT_ROLE, "content": {"path": turn.drawn_file}})
        return messages

    async def ask(turns: Conversation, message: dict[str, Any]) -> AsyncIterator[tuple]:
        """Adds a question to the conversation."""
        question, files = text(message.get("text"), engine).strip(), tuple(message.get("files") or ())
        if not question and not files:
            raise UserError("the message is empty; expected a text, an image or a video")
        read = await read_uploads(engine, files)
        turns = (*turns, Turn(question, files, tuple(read)))
        yield shown(turns), turns, gr.MultimodalTextbox(value=None, submit_btn=False, stop_btn=True), note("…")

    async def ask_again(turns: Conversation) -> AsyncIterator[tuple]:
        """Removes the last answer from the conversation."""
        if not turns:
            raise UserError("there is no question to answer; ask one")
        turns = (*turns[:-1], dataclasses.replace(turns[-1], answer=None, drawn=None, drawn_file=""))
        yield shown(turns), turns, gr.MultimodalTextbox(submit_btn=False, stop_btn=True), note("…")

    async def answer(turns: Conversation, system: str, *values: object) -> AsyncIterator[tuple]:
        """Answers the last question."""
        settings = text_settings(*values)
        messages = [Message(SYSTEM_ROLE, (text(system, engine),))] if system else []
        for turn in turns[:-1]:
            messages += [
                Message(USER_ROLE, (*turn.shown, turn.question)),
                Message(ASSISTANT_ROLE, (turn.answer or "", *([turn.drawn.image] if turn.drawn else []))),
            ]
        last = turns[-1]
        messages.append(Message(USER_ROLE, (*last.shown, last.question)))
        engine.limits.check("messages", len(messages), 1, engine.limits.messages)
        engine.limits.check_text(*(part for message in messages for part in message.parts if isinstance(part, str)))
        ticket = await engine.chat(messages, settings)
        recorded = {"system": system or None} | dataclasses.asdict(settings)
        try:
            last = dataclasses.replace(last, answer=None, settings=recorded)
            async for piece in with_heartbeat(ticket):
                if piece is None:
                    yield gr.skip(), gr.skip(), gr.skip()
                    continue
                last = dataclasses.replace(last, answer=(last.answer or "") + piece)
                yield shown((*turns[:-1], last)), (*turns[:-1], last), note("Answering …")
            completion = await ticket.result()
        finally:
            ticket.cancel()
        last = dataclasses.replace(last, answer=completion.text)
        said = length(completion)
        if completion.ended_by == "image" and not engine.draws:
            said = f"{said} {UNDRAWN[0].upper()}{UNDRAWN[1:]}."
        elif completion.ended_by == "image":
            drawing = await engine.draw_answer(messages, completion.text, DrawSettings(seed=settings.seed))
            try:
                async for made in with_heartbeat(drawing):
                    status = gr.skip() if made is None else progress(f"Drawing: step {made[0]} of {made[1]}", *made)
                    yield gr.skip(), gr.skip(), status
                drawn = await drawing.result()
            finally:
                drawing.cancel()
            file = await asyncio.to_thread(write, "drawing.png", png(drawn.image))
            last = dataclasses.replace(last, drawn=drawn, drawn_file=file)
        yield shown((*turns[:-1], last)), (*turns[:-1], last), note(said)

    async def idle(turns: Conversation) -> tuple:
        """The idle page; a question without an answer goes back to the text box."""
        back = {}
        if turns and turns[-1].answer is None:
            *kept, last = turns
            turns, back = tuple(kept), {"value": {"text": last.question, "files": list(last.files)}}
        path = await asyncio.to_thread(save, name, turns) if turns else None
        box = gr.MultimodalTextbox(submit_btn=True, stop_btn=False, **back)
        return shown(turns), turns, box, offer(path)

    async def stopped(turns: Conversation) -> tuple:
        return *await idle(turns), note("Stopped.")

    async def undo_turn(turns: Conversation) -> tuple:
        last = turns[-1] if turns else None
        value = {"text": last.question, "files": list(last.files)} if last else None
        turns = turns[:-1]
        return shown(turns), turns, gr.MultimodalTextbox(value=value, submit_btn=True, stop_btn=False), note("")

    async def reset() -> tuple:
        box = gr.MultimodalTextbox(value=None, submit_btn=True, stop_btn=False)
        return [], (), box, note(""), offer()

    answer_outputs, idle_outputs = [chatbot, conversation, status], [chatbot, conversation, box, download]
    question_outputs = [chatbot, conversation, box, status]
    answering = []
    for asking in (
        box.submit(with_errors(ask), [conversation, box], question_outputs, **EVENT),
        retry.click(with_errors(ask_again), conversation, question_outputs, **EVENT),
        examples.load_input_event.success(with_errors(ask), [conversation, box], question_outputs, **EVENT),
    ):
        event = asking.success(with_errors(answer), [conversation, system, *controls], answer_outputs, **EVENT)
        always(event, idle, conversation, idle_outputs)
        answering.append(event)
    box.stop(stopped, conversation, [*idle_outputs, status], cancels=answering, **EVENT)
    undo.click(undo_turn, conversation, question_outputs, cancels=answering, **EVENT)
    for clearing in (clear.click, chatbot.clear):  # the second is the chatbot's own button
        clearing(reset, None, [*question_outputs, download], cancels=answering, **EVENT)


def save(name: str, turns: Conversation) -> str:
    """Saves a conversation as a zip; returns its path."""
    archive = Archive()
    recorded = [
        {
            "user": archive.parts([*turn.shown, turn.question]),
            "assistant": archive.parts([turn.answer or "", *([turn.drawn] if turn.drawn else [])]),
            "settings": turn.settings,
        }
        for turn in turns
    ]
    return archive.save("chat", {"model": name, "kind": "chat", "turns": recorded})
