"""Which frames of a video are stored and shown: the reference's rule by hand, and samples of what is stored."""

import collections
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emu_jax.data.frames import FrameSampling, frame_indices, sample_frames, spread_indices
from emu_jax.errors import UserError

EIGHT_OF_24 = [1, 4, 7, 10, 13, 15, 18, 21]  # g = 23 / 8 = 2.875: 1 + round(0, 2.875, 5.75, 8.625, 11.5, …)


@pytest.mark.parametrize(
    ("frames", "expected"),
    [
        (1, [0, 0, 0, 0, 0, 0, 0, 0]),
        (2, [0, 0, 0, 0, 0, 1, 1, 1]),
        (5, [0, 0, 1, 2, 2, 2, 3, 4]),  # 0.5, 1.5 and 2.5 round to even
        (8, [0, 1, 2, 3, 4, 4, 5, 6]),
        (9, [0, 1, 2, 3, 4, 5, 6, 7]),
        (24, EIGHT_OF_24),
        (60, [3, 10, 18, 25, 33, 40, 47, 55]),
        (14315, [894, 2683, 4472, 6262, 8051, 9840, 11630, 13419]),
    ],
)
def test_the_reference_s_frames(frames, expected):
    assert frame_indices(frames) == expected


@given(frames=st.integers(1, 10**7), count=st.integers(1, 64))
def test_indices_ascend_within_the_video(frames, count):
    got = frame_indices(frames, count)
    assert len(got) == count and got == sorted(got)
    assert got[0] >= 0 and got[-1] < frames


@pytest.mark.parametrize(
    ("frames", "count", "expected"),
    [
        (1, 24, [0]),
        (8, 8, [0, 1, 2, 3, 4, 5, 6, 7]),  # where the reference would show the fifth twice and the last never
        (24, 24, [*range(24)]),
        (25, 24, [*range(24)]),
        (24, 8, EIGHT_OF_24),
        (72, 24, [1, 4, 7, 10, 13, 16, 19, 22, 25, 28, 31, 34, 37, 39, 42, 45, 48, 51, 54, 57, 60, 63, 66, 69]),
    ],
)
def test_stored_frames(frames, count, expected):
    assert spread_indices(frames, count) == expected


@given(frames=st.integers(1, 10**6), count=st.integers(1, 64))
def test_stored_frames_are_all_or_as_many_as_asked_for(frames, count):
    got = spread_indices(frames, count)
    assert len(got) == min(frames, count) and got == sorted(set(got))
    assert got[0] >= 0 and got[-1] < frames


@given(frames=st.integers(0, 40), count=st.integers(1, 12), seed=st.integers(0, 2**32 - 1))
def test_a_sample_is_some_of_the_frames_in_order(frames, count, seed):
    stored = [f"frame {number}" for number in range(frames)]
    got = sample_frames(stored, count, np.random.default_rng(seed))
    places = [stored.index(frame) for frame in got]
    assert len(got) == min(frames, count) and places == sorted(set(places))


@given(frames=st.integers(1, 24), count=st.integers(1, 8))
def test_every_stored_frame_is_reachable(frames, count):
    rng = np.random.default_rng(0)
    shown = {frame for _ in range(400) for frame in sample_frames(range(frames), count, rng)}
    assert shown == set(range(frames))


def test_every_choice_is_as_likely():
    rng = np.random.default_rng(0)
    counts = collections.Counter(tuple(sample_frames("abcd", 2, rng)) for _ in range(6000))
    print(counts)
    assert set(counts) == set(itertools.combinations("abcd", 2))
    assert all(abs(count - 1000) < 120 for count in counts.values())  # 4 standard deviations


def test_what_stores_no_more_uses_no_random_number():
    """So that folders of eight frames give the stream that they gave before there was a choice."""
    rng, other = np.random.default_rng(0), np.random.default_rng(0)
    assert FrameSampling().choose(range(8), rng) == [*range(8)]
    assert rng.random() == other.random()


def test_the_fixed_rule():
    rng = np.random.default_rng(0)
    fixed = FrameSampling(8, "fixed")
    assert fixed.choose(range(24), rng) == EIGHT_OF_24
    assert fixed.choose(range(8), rng) == [*range(8)], "a folder of the reference's eight gives these"
    assert fixed.choose(range(3), rng) == [0, 1, 2]
    assert FrameSampling(2, "fixed").choose("abcdefgh", rng) == ["b", "f"]  # g = 3.5: 1 + round(0, 3.5)


def test_wrong_settings():
    with pytest.raises(UserError, match=r"^config\.data\.video_frames=0; expected at least 1$"):
        FrameSampling(0)
    with pytest.raises(UserError, match=r"^config\.data\.frame_sampling='even'; choose one of random, fixed$"):
        FrameSampling(8, "even")
