"""Which frames of a video are stored, and which of those are shown.

    a video ─ prepare: spread_indices, STORED ─ stored frames ─ FrameSampling ─ a sample's frames, in order
    a video ─ inference: frame_indices, FRAMES ─ the reference's frames

The paper samples 8 frames of a video in training and says no more of it [M]; the reference's inference takes 8 by a
fixed rule.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from emu_jax.errors import UserError

T = TypeVar("T")

FRAMES = 8  # of a video that a model is shown
STORED = 24  # of a video that `emu-jax prepare` stores, so that every visit can show others (ours)
RULES = ("random", "fixed")


def frame_indices(frames: int, count: int = FRAMES) -> list[int]:
    """The reference's choice of `count` among `frames` >= 1: int(g / 2) + round(g * i), where g = (frames - 1) / count.

    >>> frame_indices(72)
    [4, 13, 22, 31, 40, 48, 57, 66]
    >>> frame_indices(3, count=4)
    [0, 0, 1, 2]

    Halves are rounded to even. A video of fewer frames than `count` gives some of them more than once, one frame gives
    it `count` times; the rule itself never leaves the video.
    """
    gap = (frames - 1) / count
    return [int(gap / 2) + round(gap * i) for i in range(count)]


def spread_indices(frames: int, count: int = STORED) -> list[int]:
    """`frame_indices` without repeats: all frames where there are no more than `count`.

    >>> spread_indices(24, count=8)
    [1, 4, 7, 10, 13, 15, 18, 21]
    >>> spread_indices(3, count=4)
    [0, 1, 2]
    """
    return list(range(frames)) if frames <= count else frame_indices(frames, count)


def sample_frames(frames: Sequence[T], count: int, rng: np.random.Generator) -> list[T]:
    """`count` of the frames, in order: every choice of so many is as likely as every other.

    Not one of each of `count` stretches: that the paper spreads its frames is not known. All of them, and no random
    number used, where there are no more than `count`.

    >>> sample_frames("abcdef", 3, np.random.default_rng(0))
    ['d', 'e', 'f']
    """
    if len(frames) <= count:
        return list(frames)
    return [frames[index] for index in sorted(rng.choice(len(frames), count, replace=False))]


@dataclasses.dataclass(frozen=True)
class FrameSampling:
    """How many of a video's stored frames a sample shows, and which.

    Attributes:
      count: `config.data.video_frames`; a video that stores fewer shows all of them.
      rule: `config.data.frame_sampling`: random, others at every visit, or fixed, the reference's rule over the stored
        ones.
    """

    count: int = FRAMES
    rule: str = "random"

    def __post_init__(self):
        if self.count < 1:
            raise UserError(f"config.data.video_frames={self.count}; expected at least 1")
        if self.rule not in RULES:
            raise UserError(f"config.data.frame_sampling={self.rule!r}; choose one of {', '.join(RULES)}")

    def choose(self, frames: Sequence[T], rng: np.random.Generator) -> list[T]:
        """The shown ones among the stored ones, in order."""
        if self.rule == "random":
            return sample_frames(frames, self.count, rng)
        return [frames[index] for index in spread_indices(len(frames), self.count)]


EIGHT_AT_RANDOM = FrameSampling()  # where no config says otherwise
