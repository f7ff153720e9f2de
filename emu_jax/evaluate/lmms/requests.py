"""Requests of lmms-eval -> prompts and decoding settings of Emu; nothing here needs lmms-eval itself.

generation_kwargs ─ read_settings ─ Settings
messages, or a text and its images and videos ─ turns ─ read_turns ─ turns with pixels ─ prompt ─ parts of a prompt
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import PIL.Image

from emu_jax.data.images import decode_image
from emu_jax.data.system_messages import IMAGE_SYSTEM, VIDEO_SYSTEM
from emu_jax.data.tokenizer import ASSISTANT, IMAGE, USER
from emu_jax.errors import UserError
from emu_jax.evaluate.prompts import END, Part, join
from emu_jax.generate.messages import DEFAULT_NEW_TOKENS, Video, read_video
from emu_jax.generate.prompt import ImageLike, read_image
from emu_jax.generate.text import check_decoding

# generation_kwargs, by the type of their values.
TAKEN: dict[str, type] = {
    "max_new_tokens": int,
    "num_beams": int,
    "length_penalty": float,
    "min_length": int,
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "do_sample": bool,
    "seed": int,
}
SAMPLING = ("temperature", "top_p", "top_k")
# Others, with the values that ask for nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "repetition_penalty": (1, 1.0),
    "no_repeat_ngram_size": (0,),
    "skip_special_tokens": (True,),
    "use_cache": (True,),
}
IGNORED = ("image_aspect_ratio",)  # how LLaVA pads an image; Emu's are resized to a square
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")

Content = str | ImageLike | Video


@dataclasses.dataclass(frozen=True)
class Turn:
    """What one speaker says: texts, images and videos in order; `role` is system, user or assistant."""

    role: str
    content: tuple[Content, ...]


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a request is answered; requests with equal settings share batches.

    Attributes:
      until: texts before which an answer ends.
      max_new_tokens: maximum length of an answer, in tokens.
      seed: seed of the first batch; the next batch has another.
      decoding: other keyword arguments of `Emu.generate_text`.
    """

    until: tuple[str, ...]
    max_new_tokens: int
    seed: int
    decoding: tuple[tuple[str, int | float], ...]

    def cut(self, text: str) -> str:
        """The text before the first of `until`, which are looked for one after the other, as lmms-eval's models do.

        >>> Settings(("\\n", "Q:"), 20, 0, ()).cut("a dog Q: and a cat\\n")
        'a dog '
        """
        for stop in self.until:
            text = text.split(stop)[0]
        return text


def read_settings(given: Mapping[str, Any], where: str) -> Settings:
    """The settings that a task's generation_kwargs ask for; null means that a setting is not given.

    Answers are sampled if `do_sample` is true or missing and the temperature is above 0; with `do_sample` alone the
    temperature is 1. Otherwise temperature, top_p and top_k mean nothing, as in transformers.

    >>> read_settings({"until": "\\n", "max_new_tokens": 16, "temperature": 0, "top_p": 0, "num_beams": 5}, "task vqa")
    Settings(until=('\\n',), max_new_tokens=16, seed=0, decoding=(('num_beams', 5),))

    Raises:
      UserError: a setting that Emu does not have, or a value that cannot work.
    """
    values: dict[str, Any] = {}
    until: tuple[str, ...] = ()
    for name, value in given.items():
        if value is None or name in IGNORED or value in NEUTRAL.get(name, ()):
            continue
        if name == "until":
            until = _read_until(value, where)
        elif name in TAKEN:
            values[name] = _read_value(name, value, where)
        else:
            neutral = f"; set it to {NEUTRAL[name][0]!r}" if name in NEUTRAL else ""
            raise UserError(
                f"{where}: generation_kwargs {name}={value!r} is not supported by emu_jax{neutral}; expected some of "
                f"until, {', '.join(TAKEN)}"
            )
    new_tokens, seed = values.pop("max_new_tokens", DEFAULT_NEW_TOKENS), values.pop("seed", 0)
    samples = values.pop("do_sample", None)
    if samples:
        values.setdefault("temperature", 1.0)
    if samples is False or not values.get("temperature"):
        values = {name: value for name, value in values.items() if name not in SAMPLING}
    sampling = values.get("temperature", 0.0), values.get("top_p", 1.0)
    try:
        check_decoding(values.get("num_beams", 1), new_tokens, *sampling)
    except UserError as error:
        raise UserError(f"{where}: generation_kwargs {error}") from error
    return Settings(until, new_tokens, seed, tuple(sorted(values.items())))


def _read_until(value: Any, where: str) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise UserError(f"{where}: generation_kwargs until={value!r}; expected a text or a list of texts")
    return tuple(text for text in texts if text)  # an empty one is before everything


def _read_value(name: str, value: Any, where: str) -> Any:
    wanted = TAKEN[name]
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if isinstance(value, bool) if wanted is bool else number and wanted(value) == value:
        return wanted(value)
    raise UserError(f"{where}: generation_kwargs {name}={value!r}; expected {wanted.__name__}")


# ---- what is shown and said ------------------------------------------------------------------------------------------


def read_messages(messages: Iterable[Mapping[str, Any]], frames: int, where: str) -> list[Turn]:
    """Messages of a chat task: [{"role", "content": [{"type": "text", "text"} or {"type": "image", "url"} …]}].

    Raises:
      UserError: an unknown role or type, or audio.
    """
    found = []
    for message in messages:
        role, content = message.get("role"), message.get("content")
        if role not in ("system", "user", "assistant"):
            raise UserError(f"{where}: a message's role is {role!r}; expected system, user or assistant")
        parts: list[Content] = []
        for item in [{"type": "text", "text": content}] if isinstance(content, str) else content or ():
            if item["type"] == "text":
                parts.append(item["text"])
            else:
                parts.append(_visual(item.get("url"), frames, where, kind=item["type"]))
        found.append(Turn(role, _at_placeholders(parts, where)))
    return found


def read_visuals(text: str, visuals: Sequence[Any] | None, frames: int, where: str) -> list[Turn]:
    """A simple task's text and images or videos as a user's turn: they come first, or where the text says <image>.

    Raises:
      UserError: something else than images and videos, or another number of <image>.
    """
    shown = [_visual(visual, frames, where) for visual in visuals or ()]
    return [Turn("user", _at_placeholders([*shown, text], where))]


def _visual(value: Any, frames: int, where: str, kind: str = "") -> ImageLike | Video:
    """An image, or a video of which `frames` images are shown."""
    if isinstance(value, Mapping) and kind != "audio" and value.get("type") != "audio":
        kind = value.get("type", kind)
        if set(value) & {"video_start", "video_end", "start_time", "end_time"}:
            raise UserError(f"{where}: a piece of a video from one second to another; emu_jax shows whole videos only")
        if isinstance(data := value.get("bytes"), bytes):  # an image that the library `datasets` has not decoded
            return decode_image(data, where)
        value = value.get("url") or value.get("path")
    if isinstance(value, str) and kind != "audio":
        value = pathlib.Path(value)
    if isinstance(value, pathlib.Path):
        is_image = kind == "image" or (not kind and value.suffix.lower() in IMAGE_SUFFIXES)
        return value if is_image else Video(value, frames)
    if isinstance(value, PIL.Image.Image | np.ndarray) and kind in ("", "image"):
        return value
    about = f"{kind} {type(value).__name__}".strip()
    raise UserError(f"{where}: cannot show {about}; expected images (PIL, or files) and files of videos")


def _at_placeholders(content: Sequence[Content], where: str) -> tuple[Content, ...]:
    """Images and videos moved to where the texts say <image>, if they say so: otherwise unchanged."""
    count = sum(part.count(IMAGE) for part in content if isinstance(part, str))
    if not count:
        return tuple(content)
    shown = [part for part in content if not isinstance(part, str)]
    if count != len(shown):
        raise UserError(
            f"{where}: the text says {IMAGE} {count} times; expected one for each of its {len(shown)} images"
        )
    text = "".join(part for part in content if isinstance(part, str))
    placed: list[Content] = []
    for piece, visual in zip(text.split(IMAGE), [*shown, ""], strict=True):
        placed += [piece, visual]
    return tuple(part for part in placed if not isinstance(part, str) or part)


def read_turns(turns: Sequence[Turn], size: int, where: str) -> tuple[list[Turn], bool]:
    """The turns with images as arrays [size, size, 3] and videos as their frames, and whether there is a video.

    Raises:
      UserError: a file cannot be read; names it.
    """
    read, has_video = [], False
    for turn in turns:
        parts: list[Content] = []
        for part in turn.content:
            shown = read_video(part) if isinstance(part, Video) else [part]
            has_video |= isinstance(part, Video)
            parts += [each if isinstance(each, str) else read_image(each, size, where) for each in shown]
        read.append(Turn(turn.role, tuple(parts)))
    return read, has_video


def prompt(turns: Sequence[Turn], *, has_video: bool, chat: bool, begins: str = "") -> tuple[Part, ...]:
    """The parts that the model reads.

    Args:
      turns: as `read_turns` returns them.
      has_video: chooses the paper's system message for videos, if the turns have none of their own.
      chat: whether the model was tuned to chat: then the form is the one of `prompts.chat_prompt`. The pretrained
        model reads images and texts one after the other.
      begins: words that begin the answer of a model that chats, such as the reference's "the answer is:".
    """
    if not chat:
        return join(*(_spoken(turn.content) for turn in turns)) or (" ",)
    system = "".join(str(part) for turn in turns if turn.role == "system" for part in turn.content)
    if not system and any(not isinstance(part, str) for turn in turns for part in turn.content):
        system = VIDEO_SYSTEM if has_video else IMAGE_SYSTEM
    said: list[Sequence[Part] | str] = [system]
    for turn in turns:
        if turn.role == "user":
            said += [f" {USER}: ", _spoken(turn.content), f" {ASSISTANT}:"]
        elif turn.role == "assistant":
            said += [" ", _spoken(turn.content), END]
    return join(*said, f" {begins.strip()}" if begins.strip() else "")


def _spoken(content: Sequence[Content]) -> tuple[Part, ...]:
    """Texts and images, with a space before each text that follows an image."""
    pieces: list[Part] = []
    for part in content:
        assert not isinstance(part, PIL.Image.Image | Video)  # they are arrays now
        if isinstance(part, str) and part and not part[0].isspace() and pieces and not isinstance(pieces[-1], str):
            part = f" {part}"
        pieces.append(part)
    return join(*pieces)
