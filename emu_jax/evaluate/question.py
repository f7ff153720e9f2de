"""One item of a benchmark: what is shown, what is asked, and what is known about the answer.

Readers of benchmarks' published files (`benchmarks/`) give lists of these; prompts, few-shot selection, predictions and
metrics read nothing else.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np


@dataclasses.dataclass(frozen=True)
class Question:
    """A question about images or a video, an image to describe, or a text to draw.

    Attributes:
      id: unique in its benchmark and split, and the same on every run; what submissions call it.
      images: in the order in which they are shown: files, or uint8 [H, W, 3].
      video: a video to show instead, of which the model sees 8 frames.
      text: what is asked as the files have it; "" where an image is to be described; the caption where one is drawn.
      answers: every accepted or reference answer, repeated as often as people gave it; () where they are not published.
      kind: the benchmark's own type of question or group, by which scores are also told apart; "" where it has none.
      history: earlier turns of a dialogue, (question, answer) each.
      caption: what a dialogue's people were told of the image before its first turn; "" elsewhere.
      candidates: answers to rank; () elsewhere.
      relevance: of each candidate, 0 to 1, as people judged it; () where that is not published.
    """

    id: str
    images: tuple[Path | np.ndarray, ...] = ()
    video: Path | None = None
    text: str = ""
    answers: tuple[str, ...] = ()
    kind: str = ""
    history: tuple[tuple[str, str], ...] = ()
    caption: str = ""
    candidates: tuple[str, ...] = ()
    relevance: tuple[float, ...] = ()
