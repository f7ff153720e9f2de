"""Messages that mix text, images and videos -> parts of a document, and a conversation's tokens as in training."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from emu_jax.data.document import Document, Image, Text
from emu_jax.data.sequence import tokenize_document
from emu_jax.data.system_messages import IMAGE_SYSTEM, VIDEO_SYSTEM
from emu_jax.data.tokenizer import Tokenizer
from emu_jax.errors import UserError
from emu_jax.generate.prompt import UNBOUNDED, ImageLike, embedding_index, read_image
from emu_jax.storage import Path, is_bucket

VIDEO_SUFFIXES = {".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi"}
DEFAULT_NEW_TOKENS = 256  # maximum length of an answer, unless the caller gives another


@dataclasses.dataclass(frozen=True)
class Video:
    """A video or animation, shown as `frames` images by the reference's rule (`data/frames.py`); or its images."""

    source: Path | Sequence[ImageLike]
    frames: int = 8


def read_message(
    message: Sequence[str | ImageLike | Video], image_size: int, where: str
) -> tuple[list[Text | Image], int]:
    """A user's message -> its texts and images in the form that training uses, and its number of videos.

    Raises:
      UserError: the message is empty, or a part of it cannot be read.
    """
    parts: list[Text | Image] = []
    videos = 0
    for part in message:
        if isinstance(part, str):
            part = clean(part, where, strip=False)
            add_text(parts, Text(part, "user"))
            continue
        if isinstance(part, Video) or (isinstance(part, Path) and part.suffix.lower() in VIDEO_SUFFIXES):
            video = part if isinstance(part, Video) else Video(part)
            images, videos = read_video(video), videos + 1
        else:
            images = [part]
        parts += [Image(read_image(image, image_size, where), "") for image in images]
    # White space around texts is removed, as `data/raw/chats.py` does.
    parts = [Text(part.text.strip(), "user") if isinstance(part, Text) else part for part in parts]
    if not any(isinstance(part, Image) or part.text for part in parts):
        raise UserError(f"{where}: the message is empty; expected a text, an image or a video")
    if isinstance(parts[-1], Image):
        parts.append(Text("", "user"))  # the turn that the image belongs to
    return parts, videos


def join_texts(texts: Sequence[str]) -> str:
    """Texts of one message or role, each on a line of its own: clients send sentences without space around them.

    >>> join_texts(["what is", "", "this?"])
    'what is\\nthis?'
    """
    return "\n".join(text for text in texts if text)


def add_text(parts: list[Text | Image], text: Text) -> None:
    """Appends a text to the parts of a message; `join_texts` with the last part if that is a text."""
    last = parts[-1] if parts else None
    if isinstance(last, Text):
        parts[-1] = dataclasses.replace(text, text=join_texts([last.text, text.text]))
    else:
        parts.append(text)


def default_system(parts: Sequence[Text | Image], videos: int) -> str:
    """The paper's system message for a conversation whose first message has these parts; "" without images."""
    return VIDEO_SYSTEM if videos else IMAGE_SYSTEM if any(isinstance(part, Image) for part in parts) else ""


def tokenize_conversation(
    parts: Sequence[Text | Image], tokenizer: Tokenizer, queries: int
) -> tuple[Int[np.ndarray, " T"], Int[np.ndarray, " T"]]:
    """A conversation that ends with an answer -> its tokens, exactly as training packs them up to the last </s>.

    Returns:
      int32 ids; and at every <image>, the row of its embedding among the images' [I*Q, D], -1 elsewhere.
    """
    (conversation,) = tokenize_document(
        Document(tuple(parts)), tokenizer, queries=queries, row_tokens=UNBOUNDED, row_images=UNBOUNDED
    )
    return conversation.tokens, embedding_index(conversation.slots >= 0)


def read_video(video: Video) -> Sequence[ImageLike]:
    """The images of a video.

    Raises:
      UserError: not a video, a truncated one, or one without enough frames.
    """
    if not isinstance(video.source, Path):
        if isinstance(video.source, str) or not len(video.source):
            raise UserError(f"Video({video.source!r}): expected a pathlib.Path or a list of images")
        return list(video.source)
    if video.frames < 1:
        raise UserError(f"{video.source}: frames={video.frames}; expected at least 1")
    try:
        from emu_jax.data.video import VideoError, read_frames
    except ModuleNotFoundError as error:
        raise UserError(f"{video.source}: videos are read by PyAV, which is missing; pip install av") from error
    if not video.source.is_file():
        raise UserError(f"{video.source}: no such video file")
    try:
        # PyAV seeks in a file: one in a bucket is read whole.
        return read_frames(video.source.read_bytes() if is_bucket(video.source) else video.source, video.frames)
    except VideoError as error:
        raise UserError(f"{video.source}: {error.detail}; expected a whole video or animation") from error
    except OSError as error:
        raise UserError(f"{video.source}: cannot be read ({error.strerror or error})") from error


def clean(text: str, where: str, *, strip: bool = True) -> str:
    """Text as in training (`data/raw/files.py`): without NULs and, with `strip`, without white space around it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: not Unicode text ({error.reason} at character {error.start})") from error
    text = text.replace("\0", "")
    return text.strip() if strip else text
