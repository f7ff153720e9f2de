"""The readers by the names that `emu-jax prepare` knows them by."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Sequence
from typing import Any

from emu_jax.data.raw.reader import Reader
from emu_jax.errors import UserError, nearest

# Name -> (module, class, what it reads).
READERS = {
    "pairs": ("pairs", "ImageText", "images with captions: img2dataset's tars, or parquet"),
    "coco": ("pairs", "Coco", "images with captions: COCO's JSON"),
    "videos": ("videos", "Videos", "videos and animations with captions: a CSV, as WebVid's"),
    "storyboards": ("storyboards", "Storyboards", "frames at a fixed interval, and subtitles"),
    "mmc4": ("mmc4", "Mmc4", "web documents: MMC4's JSONL and images"),
    "obelics": ("obelics", "Obelics", "web documents: lists of texts and images, as OBELICS's"),
    "html": ("html", "Html", "web documents: HTML pages and their images"),
    "chats": ("chats", "Chats", "conversations: LLaVA's, ShareGPT's, Alpaca's JSON"),
    "videochat": ("video_chats", "VideoChat", "conversations about videos: VideoChat's JSON"),
    "video_chatgpt": ("video_chats", "VideoChatGPT", "questions about videos: Video-ChatGPT's JSON"),
}


def make_reader(name: str, settings: Sequence[str] = ()) -> Reader:
    """The reader of that name; settings as `field=value`, several values separated by commas.

    >>> make_reader("storyboards", ["subtitles=said"])
    Storyboards(subtitles='said', labels='')
    >>> make_reader("pair")
    Traceback (most recent call last):
    emu_jax.errors.UserError: source 'pair' is unknown; did you mean pairs?

    Raises:
      UserError: no such reader, field or value.
    """
    if name not in READERS:
        raise UserError(f"source {name!r} is unknown; did you mean {nearest(name, READERS)}?")
    module, cls, _ = READERS[name]
    reader = getattr(importlib.import_module(f"emu_jax.data.raw.{module}"), cls)
    fields = {field.name: field for field in dataclasses.fields(reader)}
    values = {}
    for text in settings:
        field, separator, value = text.partition("=")
        if not separator or field not in fields:
            raise UserError(f"--set {text}: expected field=value, with a field of {cls}: {', '.join(fields)}")
        values[field] = _parse(value, fields[field].default, text)
    return reader(**values)


def _parse(value: str, default: Any, text: str) -> Any:
    """A value of the default's type."""
    try:
        if isinstance(default, bool):
            return {"true": True, "false": False}[value.lower()]
        if isinstance(default, tuple):
            return tuple(value.split(",")) if value else ()
        return type(default)(value)
    except (KeyError, ValueError) as error:
        raise UserError(f"--set {text}: expected a {type(default).__name__}, such as {default!r}") from error
