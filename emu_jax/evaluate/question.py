"""One item of a benchmark: what is shown, what is asked, and what is known about the answer.

Readers of benchmarks (`benchmarks/`) return lists of these; prompts, few-shot selection, predictions and metrics read
nothing else. A benchmark may derive a class whose further fields only its own metrics read (`benchmarks/gqa.py`).
"""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np

from emu_jax.data.images import StoredImage
from emu_jax.storage import Path


@dataclasses.dataclass(frozen=True)
class Question:
    """A question about images or a video, an image to describe, or a text to draw.

    Attributes:
      id: unique in its benchmark and split, and the same on every run; submissions use it.
      images: files, files in cells of a table, or uint8 [H, W, 3], in the order in which they are shown.
      video: a video to show instead; the model sees `frames` images of it.
      hint: what the files say before the question, such as a passage; otherwise "".
      text: the question as in the files; "" if the task is to describe the image; the caption if it is to draw one.
      answers: every accepted or reference answer, repeated as often as people gave it; () if they are not published.
      kind: the benchmark's own type or group of questions, for which there are separate scores; "" if it has none.
      history: earlier turns of a dialogue, (question, answer) each.
      caption: the line about the image that a dialogue began with; otherwise "".
      candidates: answers to rank, or options to choose from; otherwise (). An option is answered by its letter.
      relevance: each candidate's relevance as people judged it, 0 to 1; () if it is not published.
    """

    id: str
    images: tuple[Path | StoredImage | np.ndarray, ...] = ()
    video: Path | None = None
    frames: int = 8
    hint: str = ""
    text: str = ""
    answers: tuple[str, ...] = ()
    kind: str = ""
    history: tuple[tuple[str, str], ...] = ()
    caption: str = ""
    candidates: tuple[str, ...] = ()
    relevance: tuple[float, ...] = ()


def content_digest(image: StoredImage | np.ndarray) -> str:
    """SHA-256 of an image that has no path."""
    return hashlib.sha256(image.data if isinstance(image, StoredImage) else image.tobytes()).hexdigest()
