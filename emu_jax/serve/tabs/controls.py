"""Shared by all tabs: settings as widgets and checks of their values, errors as one line, progress as a bar."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import html
import math
from collections.abc import AsyncIterable, AsyncIterator, Callable
from typing import Any, TypeVar

import gradio as gr
from gradio.events import Dependency

from emu_jax.errors import UserError
from emu_jax.generate.samplers import sampler_names
from emu_jax.serve.engine import Completion, Engine
from emu_jax.serve.settings import DrawSettings, TextSettings
from emu_jax.serve.ticket import Busy, Failed, Stopping, TimeUp

# Settings of every event: no concurrency limit, because the engine's queue has one; not part of a documented API.
EVENT: dict[str, Any] = {"concurrency_limit": None, "api_visibility": "private", "show_progress": "hidden"}

DISCONNECT_SECONDS = 3.0  # without a request for the next update, the client counts as disconnected
Event = TypeVar("Event")


def one_line(error: Exception) -> gr.Error:
    """An error for the user -> a message on the page, as plain text without markup."""
    return gr.Error(html.escape(str(error)), duration=10, print_exception=False)


def with_errors(handler: Callable[..., AsyncIterator]) -> Callable[..., AsyncIterator]:
    """Wraps a handler: shows errors to the user as one line, and cancels pending work when the client disconnects.

    Gradio requests the next update as soon as it has one. When the client has disconnected it stops requesting, but
    does not close the handler, which would hold its resources until it is garbage-collected.
    """

    @functools.wraps(handler)
    async def wrapped(*arguments):
        loop = asyncio.get_running_loop()
        closing: list[asyncio.Task] = []
        try:
            async with contextlib.aclosing(handler(*arguments)) as updates:
                async for update in updates:
                    timer = loop.call_later(
                        DISCONNECT_SECONDS, lambda: closing.append(loop.create_task(updates.aclose()))
                    )
                    try:
                        yield update
                    finally:
                        timer.cancel()
        except (UserError, Busy, Stopping, TimeUp, Failed) as error:
            raise one_line(error) from None

    return wrapped


def always(event: Dependency, handler: Callable, inputs: object, outputs: object) -> None:
    """Runs a handler after an event, whether it succeeded or failed (`then` runs only after success)."""
    event.success(handler, inputs, outputs, **EVENT)
    event.failure(handler, inputs, outputs, **EVENT)


async def with_heartbeat(events: AsyncIterable[Event], seconds: float = 1.0) -> AsyncIterator[Event | None]:
    """Events as they arrive, and None after every idle second: yielding it detects that the client has disconnected."""
    iterator, end = aiter(events), object()

    async def next_event() -> Event | object:
        return await anext(iterator, end)

    task = asyncio.create_task(next_event())
    try:
        while True:
            done, _ = await asyncio.wait([task], timeout=seconds)
            if not done:
                yield None
                continue
            if task.result() is end:
                return
            event = task.result()
            task = asyncio.create_task(next_event())
            yield event
    finally:
        task.cancel()
        await asyncio.wait([task])
        if hasattr(iterator, "aclose"):
            await iterator.aclose()


# ---------------------------------------------------------------- values


def whole(value: object, name: str) -> int:
    """A whole number from the page; UserError for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value != int(number(value, name)):
        raise UserError(f"{name}={value!r}; expected a whole number")
    return int(value)


def number(value: object, name: str) -> float:
    """A number from the page; UserError for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{name}={value!r}; expected a number")
    return float(value)


def text(value: object, engine: Engine) -> str:
    """A text from the page; UserError for anything else, or a text that is too long."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(f"expected a text, got {type(value).__name__}")
    engine.limits.check_text(value)
    return value


# ---------------------------------------------------------------- settings


def new_tokens_slider(engine: Engine, count: int, info: str) -> gr.Slider:
    """The maximum number of new tokens of a text, at first `count`."""
    most = min(engine.limits.new_tokens, engine.plain.config.llama.context)
    return gr.Slider(1, most, min(count, most), step=1, label="New tokens", info=info)


def text_controls(engine: Engine, *, new_tokens: int) -> list[gr.components.Component]:
    """Adds widgets for the decoding settings of a text."""
    tokens = new_tokens_slider(engine, new_tokens, "Maximum")
    temperature = gr.Slider(0, 2, 0, step=0.05, label="Temperature", info="0: greedy decoding")
    top_p = gr.Slider(0.05, 1, 1, step=0.05, label="Top-p", info="Total probability of the likeliest tokens")
    return [tokens, temperature, top_p, _seed()]


def text_settings(tokens: object, temperature: object, top_p: object, seed: object) -> TextSettings:
    """Values of `text_controls`; the engine checks their bounds."""
    return TextSettings(
        max_new_tokens=whole(tokens, "max_tokens"),
        temperature=number(temperature, "temperature"),
        top_p=number(top_p, "top_p"),
        seed=whole(seed, "seed"),
    )


def draw_controls(engine: Engine) -> list[gr.components.Component]:
    """Adds widgets for the sampling settings of images."""
    limits = engine.limits
    sampler = gr.Dropdown(sampler_names(), value="pndm", label="Sampler")
    steps = gr.Slider(1, limits.steps, min(50, limits.steps), step=1, label="Steps")
    guidance = gr.Slider(0, min(20, limits.guidance), 7.5, step=0.5, label="Guidance scale", info="1: no guidance")
    return [sampler, steps, guidance, _seed()]


def _seed() -> gr.Number:
    return gr.Number(0, precision=0, minimum=0, maximum=2**32 - 1, label="Seed")


def draw_settings(sampler: object, steps: object, guidance: object, seed: object) -> DrawSettings:
    """Values of `draw_controls`; the engine checks their bounds."""
    return DrawSettings(
        sampler=str(sampler),
        steps=whole(steps, "steps"),
        guidance=number(guidance, "guidance"),
        seed=whole(seed, "seed"),
    )


def upload_box(engine: Engine, name: str, placeholder: str, kinds: list[str], **settings: Any) -> gr.MultimodalTextbox:
    """Adds a box for a text and files; `name` is its id on the page."""
    return gr.MultimodalTextbox(
        show_label=False,
        elem_id=name,
        placeholder=placeholder,
        file_types=kinds,
        file_count="multiple",
        max_plain_text_length=engine.limits.text_characters,
        sources=["upload"],
        **settings,
    )


# ---------------------------------------------------------------- status


def note(words: str) -> str:
    """A line in small type."""
    return f'<p class="note">{html.escape(words)}</p>'


def length(completion: Completion) -> str:
    """The length of a text, and why it ended."""
    if not completion.new_tokens:
        return f"The model added nothing to this prompt of {completion.prompt_tokens} tokens."
    ended = "; it stopped at the maximum number of new tokens." if completion.ended_by == "length" else "."
    count = "1 token" if completion.new_tokens == 1 else f"{completion.new_tokens} tokens"
    return f"{count} after a prompt of {completion.prompt_tokens}{ended}"


def progress(words: str, made: int = 0, of: int = 0) -> str:
    """A line and a progress bar; without `of`, an indeterminate one."""
    share = f' value="{made}" max="{of}"' if of else ""
    return f'<div class="going"><span>{html.escape(words)}</span><progress{share}></progress></div>'


def offer(path: str | None = None) -> gr.DownloadButton:
    """An update of a download button, which offers a file, or nothing."""
    return gr.DownloadButton(value=path, interactive=path is not None)
