"""The choice of a video's frames: which ones are stored, and which of these are shown.

    a video ─ prepare: spread_indices, STORED ─ stored frames ─ FrameSampling ─ a sample's frames, in order
    a video ─ inference: frame_indices, FRAMES ─ the reference's frames

The paper samples 8 frames per video in training and does not say how [M]; the reference's inference takes 8 by a fixed
rule.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from emu_jax.errors import UserError

T = TypeVar("T")

FRAMES = 8  # frames of a video that a model is shown
STORED = 24  # frames of a video that `emu-jax prepare` stores, so that every epoch can show others (ours)
SAMPLING_RULES = ("random", "fixed")


def frame_indices(frames: int, count: int = FRAMES) -> list[int]:
    """The reference's choice of `count` among `frames` >= 1: int(g / 2) + round(g * i) with g = (frames - 1) / count.

    >>> frame_indices(72)
    [4, 13, 22, 31, 40, 48, 57, 66]
    >>> frame_indices(3, count=4)
    [0, 0, 1, 2]

    Halves are rounded to even. With fewer frames than `count`, some frames are repeated. The indices never exceed the
    video.
    """
    gap = (frames - 1) / count
    return [int(gap / 2) + round(gap * i) for i in range(count)]


def spread_indices(frames: int, count: int = STORED) -> list[int]:
    """`frame_indices` without repeats: all frames if there are at most `count`.

    >>> spread_indices(24, count=8)
    [1, 4, 7, 10, 13, 15, 18, 21]
    >>> spread_indices(3, count=4)
    [0, 1, 2]
    """
    return list(range(frames)) if frames <= count else frame_indices(frames, count)


def sample_frames(frames: Sequence[T], count: int, rng: np.random.Generator) -> list[T]:
    """A uniformly random subset of `count` frames, in order.

    The frames are not spread evenly: it is not known whether the paper's are. If there are at most `count` frames, all
    are returned, and no random number is drawn.

    >>> sample_frames("abcdef", 3, np.random.default_rng(0))
    ['d', 'e', 'f']
    """
    if len(frames) <= count:
        return list(frames)
    return [frames[index] for index in sorted(rng.choice(len(frames), count, replace=False))]


@dataclasses.dataclass(frozen=True)
class FrameSampling:
    """The choice of a sample's frames among the stored frames of a video.

    Attributes:
      count: `config.data.video_frames`, the number of frames; all of them if fewer are stored.
      rule: `config.data.frame_sampling`: "random" draws new ones in every epoch, "fixed" is the reference's rule.
    """

    count: int = FRAMES
    rule: str = "random"

    def __post_init__(self):
        if self.count < 1:
            raise UserError(f"config.data.video_frames={self.count}; expected at least 1")
        if self.rule not in SAMPLING_RULES:
            raise UserError(f"config.data.frame_sampling={self.rule!r}; choose one of {', '.join(SAMPLING_RULES)}")

    def choose(self, frames: Sequence[T], rng: np.random.Generator) -> list[T]:
        """The frames that are shown, in order."""
        if self.rule == "random":
            return sample_frames(frames, self.count, rng)
        return [frames[index] for index in spread_indices(len(frames), self.count)]


EIGHT_AT_RANDOM = FrameSampling()  # the default
