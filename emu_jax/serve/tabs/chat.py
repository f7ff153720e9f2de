"""Conversations about images and clips: answers stream, and can be stopped, asked for again and taken back."""

from __future__ import annotations

import asyncio
import dataclasses
import html
from collections.abc import AsyncIterator
from typing import Any

import gradio as gr

from emu_jax.data.embedded_chats import NAME_ASKS, TONE_ASKS
from emu_jax.errors import UserError
from emu_jax.serve.downloads import Record
from emu_jax.serve.engine import Engine
from emu_jax.serve.sequences import ASSISTANT_ROLE, SYSTEM_ROLE, USER_ROLE, Message
from emu_jax.serve.tabs.controls import EVENT, TextControls, always, beating, length, note, text, text_settings, told
from emu_jax.serve.tabs.samples import Sample
from emu_jax.serve.uploads import read_uploads

EMPTY = """### Ask about an image
Show one or several, or a short clip, and ask. Images may come in any turn.
"""
HOW = """### This model does not chat
It was pretrained, not tuned to follow instructions: it continues text and images (see the other tabs).

`launch/quickstart.sh` trains a model that chats, in `runs/quickstart/chat`; `emu-jax serve` takes it from there. Of the
published weights, `Emu-instruct.pt` chats.
"""


@dataclasses.dataclass(frozen=True)
class Turn:
    """One question and its answer so far.

    Attributes:
      said: what the person wrote. files: what they uploaded, as the page shows it. shown: as the model reads it.
      answer: None before its first piece. settings: how it was asked for.
    """

    said: str
    files: tuple[str, ...]
    shown: tuple[Any, ...]
    answer: str | None = None
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)


Conversation = tuple[Turn, ...]


def show(engine: Engine, name: str, samples: list[Sample]) -> None:
    """Adds the tab's content."""
    if not engine.chats:
        gr.Markdown(HOW, elem_classes="empty")
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
            box = gr.MultimodalTextbox(
                show_label=False,
                elem_id="ask",
                placeholder="Ask about an image or a clip",
                file_types=["image", "video"],
                file_count="multiple",
                max_plain_text_length=engine.limits.text_characters,
                sources=["upload"],
            )
            with gr.Row(elem_classes="tools"):
                retry = gr.Button("Ask again", size="sm", min_width=90)
                undo = gr.Button("Take back", size="sm", min_width=90)
                clear = gr.Button("Clear", size="sm", min_width=90)
                download = gr.DownloadButton("Download", size="sm", min_width=90, interactive=False)
            status = gr.HTML(note(""), elem_id="chat-status", padding=False)
            gr.Examples(
                [
                    [{"text": NAME_ASKS, "files": [samples[1].path]}],
                    [{"text": TONE_ASKS, "files": [samples[6].path]}],
                    [{"text": f"yes or no, is this a {samples[2].thing}", "files": [samples[2].path]}],
                ],
                box,
                label="Examples, with images that training has not seen",
                elem_id="chat-examples",
            )
        with gr.Column(scale=1, min_width=260), gr.Accordion("Settings", open=True):
            system = gr.Textbox(
                label="System message",
                info="Empty: the paper's, where the first turn shows an image",
                lines=2,
                max_lines=6,
            )
            controls = TextControls.show(engine, new_tokens=64)

    def shown(turns: Conversation) -> list[dict[str, Any]]:
        messages = []
        for turn in turns:
            for file in turn.files:
                messages.append({"role": USER_ROLE, "content": {"path": file}})
            if turn.said:
                messages.append({"role": USER_ROLE, "content": html.escape(turn.said)})
            if turn.answer is not None:
                messages.append({"role": ASSISTANT_ROLE, "content": html.escape(turn.answer)})
        return messages

    async def ask(turns: Conversation, asked: dict[str, Any]) -> AsyncIterator[tuple]:
        """The question enters the conversation."""
        said, files = text(asked.get("text"), engine).strip(), tuple(asked.get("files") or ())
        if not said and not files:
            raise UserError("the message is empty; expected a text, an image or a video")
        size = engine.plain.config.vision.image_size
        read = await asyncio.to_thread(read_uploads, files, engine.limits, size)
        turns = (*turns, Turn(said, files, tuple(read)))
        yield shown(turns), turns, gr.MultimodalTextbox(value=None, submit_btn=False, stop_btn=True), note("…")

    async def ask_again(turns: Conversation) -> AsyncIterator[tuple]:
        """The last answer leaves the conversation."""
        if not turns:
            raise UserError("there is no question to be answered; ask one")
        turns = (*turns[:-1], dataclasses.replace(turns[-1], answer=None))
        yield shown(turns), turns, gr.MultimodalTextbox(submit_btn=False, stop_btn=True), note("…")

    async def answer(turns: Conversation, system: str, *values: object) -> AsyncIterator[tuple]:
        """The last question is answered."""
        settings = text_settings(*values)
        messages = [Message(SYSTEM_ROLE, (text(system, engine),))] if system else []
        for turn in turns[:-1]:
            messages += [Message(USER_ROLE, (*turn.shown, turn.said)), Message(ASSISTANT_ROLE, (turn.answer or "",))]
        last = turns[-1]
        messages.append(Message(USER_ROLE, (*last.shown, last.said)))
        engine.limits.check("messages", len(messages), 1, engine.limits.messages)
        engine.limits.check_text(*(part for message in messages for part in message.parts if isinstance(part, str)))
        ticket = await engine.chat(messages, settings)
        asked = {"system": system or None} | dataclasses.asdict(settings)
        try:
            last = dataclasses.replace(last, answer=None, settings=asked)
            async for piece in beating(ticket):
                if piece is None:
                    yield gr.skip(), gr.skip(), gr.skip()
                    continue
                last = dataclasses.replace(last, answer=(last.answer or "") + piece)
                yield shown((*turns[:-1], last)), (*turns[:-1], last), note("Answering …")
            written = await ticket.result()
        finally:
            ticket.cancel()
        last = dataclasses.replace(last, answer=written.text)
        yield shown((*turns[:-1], last)), (*turns[:-1], last), note(length(written))

    async def rest(turns: Conversation) -> tuple:
        """The page when nothing is being written; a question without any answer goes back to where it came from."""
        back = {}
        if turns and turns[-1].answer is None:
            *kept, last = turns
            turns, back = tuple(kept), {"value": {"text": last.said, "files": list(last.files)}}
        path = await asyncio.to_thread(save, name, turns) if turns else None
        box = gr.MultimodalTextbox(submit_btn=True, stop_btn=False, **back)
        return shown(turns), turns, box, gr.DownloadButton(value=path, interactive=path is not None)

    async def stopped(turns: Conversation) -> tuple:
        return *await rest(turns), note("Stopped.")

    async def take_back(turns: Conversation) -> tuple:
        last = turns[-1] if turns else None
        value = {"text": last.said, "files": list(last.files)} if last else None
        turns = turns[:-1]
        return shown(turns), turns, gr.MultimodalTextbox(value=value, submit_btn=True, stop_btn=False), note("")

    async def forget() -> tuple:
        box = gr.MultimodalTextbox(value=None, submit_btn=True, stop_btn=False)
        return [], (), box, note(""), gr.DownloadButton(value=None, interactive=False)

    result, resting = [chatbot, conversation, status], [chatbot, conversation, box, download]
    begun = [chatbot, conversation, box, status]
    answering = []
    for asking in (
        box.submit(told(ask), [conversation, box], begun, **EVENT),
        retry.click(told(ask_again), conversation, begun, **EVENT),
    ):
        event = asking.success(told(answer), [conversation, system, *controls.inputs], result, **EVENT)
        always(event, rest, conversation, resting)
        answering.append(event)
    box.stop(stopped, conversation, [*resting, status], cancels=answering, **EVENT)
    undo.click(take_back, conversation, begun, cancels=answering, **EVENT)
    for clearing in (clear.click, chatbot.clear):  # the latter is the chatbot's own button
        clearing(forget, None, [*begun, download], cancels=answering, **EVENT)


def save(name: str, turns: Conversation) -> str:
    """A conversation as a zip; its path."""
    record = Record()
    said = [
        {"user": record.parts([*turn.shown, turn.said]), "assistant": turn.answer, "settings": turn.settings}
        for turn in turns
    ]
    return record.save("chat", {"model": name, "kind": "chat", "turns": said})
