"""What tabs share: settings as widgets and their values checked, errors as one line, progress as a bar."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import html
import math
from collections.abc import AsyncIterable, AsyncIterator, Callable
from typing import Any, TypeVar

import gradio as gr
from gradio.events import Dependency

from emu_jax.errors import UserError
from emu_jax.generate.samplers import sampler_names
from emu_jax.serve.engine import Busy, DrawSettings, Engine, Failed, Stopping, TextSettings, TimeUp, Written

# Of every event: any number at a time, as the engine's queue bounds them; none of them is a documented interface.
EVENT: dict[str, Any] = {"concurrency_limit": None, "api_visibility": "private", "show_progress": "hidden"}

LEFT_SECONDS = 3.0  # without asking for the next update, after which nobody is there
Event = TypeVar("Event")


def one_line(error: Exception) -> gr.Error:
    """An error that a person can understand -> what the page shows of it: its text, and no markup in it."""
    return gr.Error(html.escape(str(error)), duration=10, print_exception=False)


def told(handler: Callable[..., AsyncIterator]) -> Callable[..., AsyncIterator]:
    """A handler whose errors are told to the person in one line; when it is left, what it waits for is given up.

    Gradio asks for the next update as soon as it has one. When a person has left it asks no more, and closes nothing:
    the handler would wait for the garbage collector with all that it holds.
    """

    @functools.wraps(handler)
    async def telling(*arguments):
        loop = asyncio.get_running_loop()
        closing: list[asyncio.Task] = []
        try:
            async with contextlib.aclosing(handler(*arguments)) as updates:
                async for update in updates:
                    left = loop.call_later(LEFT_SECONDS, lambda: closing.append(loop.create_task(updates.aclose())))
                    try:
                        yield update
                    finally:
                        left.cancel()
        except (UserError, Busy, Stopping, TimeUp, Failed) as error:
            raise one_line(error) from None

    return telling


def always(event: Dependency, handler: Callable, inputs: object, outputs: object) -> None:
    """What happens behind an event, whether it went well or not (`then` means the first alone)."""
    event.success(handler, inputs, outputs, **EVENT)
    event.failure(handler, inputs, outputs, **EVENT)


async def beating(events: AsyncIterable[Event], seconds: float = 1.0) -> AsyncIterator[Event | None]:
    """Events as they come, and None where none came for a while: who yields then learns that the client has left."""
    iterator, end = aiter(events), object()

    async def following() -> Event | object:
        return await anext(iterator, end)

    task = asyncio.create_task(following())
    try:
        while True:
            done, _ = await asyncio.wait([task], timeout=seconds)
            if not done:
                yield None
                continue
            if task.result() is end:
                return
            event = task.result()
            task = asyncio.create_task(following())
            yield event
    finally:
        task.cancel()
        await asyncio.wait([task])
        if hasattr(iterator, "aclose"):
            await iterator.aclose()


# ---------------------------------------------------------------- values


def whole(value: object, name: str) -> int:
    """A number from the page as a whole one; UserError where it is none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value != int(number(value, name)):
        raise UserError(f"{name}={value!r}; expected a whole number")
    return int(value)


def number(value: object, name: str) -> float:
    """A number from the page; UserError where it is none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{name}={value!r}; expected a number")
    return float(value)


def text(value: object, engine: Engine) -> str:
    """A text from the page; UserError where it is none, or too long."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(f"expected a text, got {type(value).__name__}")
    engine.limits.check_text(value)
    return value


# ---------------------------------------------------------------- settings


@dataclasses.dataclass(frozen=True)
class TextControls:
    """How a text is written, as widgets."""

    inputs: list[gr.components.Component]

    @classmethod
    def show(cls, engine: Engine, *, new_tokens: int) -> TextControls:
        """Adds them to the page."""
        most = min(engine.limits.new_tokens, engine.plain.config.llama.context)
        tokens = gr.Slider(1, most, min(new_tokens, most), step=1, label="New tokens", info="At most")
        temperature = gr.Slider(0, 2, 0, step=0.05, label="Temperature", info="0: the likeliest token")
        top_p = gr.Slider(0.05, 1, 1, step=0.05, label="Top-p", info="Share of the likeliest")
        seed = gr.Number(0, precision=0, minimum=0, maximum=2**32 - 1, label="Seed")
        return cls([tokens, temperature, top_p, seed])


def text_settings(tokens: object, temperature: object, top_p: object, seed: object) -> TextSettings:
    """Values of `TextControls`; the engine checks their bounds."""
    return TextSettings(
        max_new_tokens=whole(tokens, "max_tokens"),
        temperature=number(temperature, "temperature"),
        top_p=number(top_p, "top_p"),
        seed=whole(seed, "seed"),
    )


@dataclasses.dataclass(frozen=True)
class DrawControls:
    """How images are drawn, as widgets."""

    inputs: list[gr.components.Component]

    @classmethod
    def show(cls, engine: Engine) -> DrawControls:
        """Adds them to the page."""
        limits = engine.limits
        sampler = gr.Dropdown(sampler_names(), value="pndm", label="Sampler")
        steps = gr.Slider(1, limits.steps, min(50, limits.steps), step=1, label="Steps")
        guidance = gr.Slider(0, min(20, limits.guidance), 7.5, step=0.5, label="Guidance", info="1: none")
        seed = gr.Number(0, precision=0, minimum=0, maximum=2**32 - 1, label="Seed")
        return cls([sampler, steps, guidance, seed])


def draw_settings(sampler: object, steps: object, guidance: object, seed: object) -> DrawSettings:
    """Values of `DrawControls`; the engine checks their bounds."""
    return DrawSettings(
        sampler=str(sampler),
        steps=whole(steps, "steps"),
        guidance=number(guidance, "guidance"),
        seed=whole(seed, "seed"),
    )


# ---------------------------------------------------------------- what is going on


def note(words: str) -> str:
    """A line of small print."""
    return f'<p class="note">{html.escape(words)}</p>'


def length(written: Written) -> str:
    """How long a text is, and why it ended."""
    if not written.new_tokens:
        return f"The model has nothing to say after this prompt of {written.prompt_tokens} tokens."
    ended = "; it was cut there, by the setting." if written.ended_by == "length" else "."
    count = "1 token" if written.new_tokens == 1 else f"{written.new_tokens} tokens"
    return f"{count} after a prompt of {written.prompt_tokens}{ended}"


def progress(words: str, made: int = 0, of: int = 0) -> str:
    """A line and a bar; without `of` a bar that does not say how far."""
    share = f' value="{made}" max="{of}"' if of else ""
    return f'<div class="going"><span>{html.escape(words)}</span><progress{share}></progress></div>'
