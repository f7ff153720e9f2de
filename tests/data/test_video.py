"""Frames of videos and animations: which ones, in every format; what is cut, empty or no video."""

import io
import pickle
import random
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image as PIL

from emu_jax.data import decoding, video
from emu_jax.data.frames import frame_indices, spread_indices
from emu_jax.data.video import VideoError, read_frames

FIRST, STEP = 8, 4  # frame i is grey 8 + 4 i


def _video(path: Path, frames: int, codec="libx264", gop: int = 12, size=(32, 48), **options: str) -> bytes:
    height, width = size
    with av.open(path, "w", options=options) as container:
        stream = container.add_stream(codec, rate=24, width=width, height=height, pix_fmt="yuv420p")
        stream.codec_context.gop_size, stream.bit_rate = gop, 4_000_000
        for index in range(frames):
            pixels = np.full((height, width, 3), FIRST + STEP * index, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path.read_bytes()


def _animation(kind: str, frames: int, **options) -> bytes:
    images = [PIL.new("RGB", (48, 32), (FIRST + STEP * index,) * 3) for index in range(frames)]
    buffer = io.BytesIO()
    images[0].save(buffer, kind, save_all=True, append_images=images[1:], duration=40, **options)
    return buffer.getvalue()


def _numbers(frames: list[np.ndarray]) -> list[int]:
    """Which frames these are, by their grey."""
    assert all(frame.dtype == np.uint8 and frame.shape[2] == 3 for frame in frames)
    return [round((float(frame.mean()) - FIRST) / STEP) for frame in frames]


def _reason(data: bytes) -> str:
    with pytest.raises(VideoError) as caught:
        read_frames(data)
    assert caught.value.detail and "\n" not in caught.value.detail
    return caught.value.reason


# ---------------------------------------------------------------- formats

VIDEOS = {
    "video.mp4": ("libx264", {}),
    "start.mp4": ("libx264", {"movflags": "faststart"}),
    "pieces.mp4": ("libx264", {"movflags": "frag_keyframe+empty_moov"}),
    "part4.mp4": ("mpeg4", {}),
    "video.webm": ("libvpx", {}),
    "video.mkv": ("libx264", {}),
    "video.avi": ("mpeg4", {}),
}


@pytest.mark.parametrize("name", VIDEOS)
def test_videos(tmp_path, name):
    codec, options = VIDEOS[name]
    data = _video(tmp_path / name, 60, codec, **options)
    got = read_frames(data)
    assert _numbers(got) == frame_indices(60) == [3, 10, 18, 25, 33, 40, 47, 55]
    assert got[0].shape == (32, 48, 3)
    from_path = read_frames(tmp_path / name)
    assert all(np.array_equal(one, other) for one, other in zip(got, from_path, strict=True))


@pytest.mark.parametrize(("kind", "options"), [("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {})])
def test_animations(kind, options):
    assert _numbers(read_frames(_animation(kind, 30, **options))) == frame_indices(30)


@pytest.mark.parametrize("gop", [1, 5, 250])
def test_seeking_gives_what_decoding_in_order_gives(tmp_path, gop):
    data = _video(tmp_path / "video.mp4", 60, gop=gop)
    with av.open(io.BytesIO(data)) as container:
        inorder = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    for count in (1, 2, 8, 60):
        expected = [inorder[index] for index in frame_indices(60, count)]
        assert all(np.array_equal(one, other) for one, other in zip(read_frames(data, count), expected, strict=True))


def test_a_short_video_gives_every_frame_once(tmp_path):
    for data in (_video(tmp_path / "video.mp4", 5), _animation("WEBP", 5, lossless=True)):
        assert _numbers(read_frames(data, 8, spread_indices)) == [0, 1, 2, 3, 4]
        assert _numbers(read_frames(data, 8)) == [0, 0, 1, 2, 2, 2, 3, 4]


def test_a_video_whose_frames_share_one_time_is_decoded_in_order(tmp_path):
    data = _video(tmp_path / "video.mp4", 60)
    at = data.index(b"stts") + 8
    assert data[at : at + 12].hex() == "000000010000003c00000200"  # one entry: 60 frames of 512 ticks
    timeless = data[: at + 8] + bytes(4) + data[at + 12 :]
    assert _numbers(read_frames(timeless)) == frame_indices(60)


def test_one_frame(tmp_path):
    for data in (_video(tmp_path / "one.mp4", 1), _animation("GIF", 1), _animation("WEBP", 1), _animation("PNG", 1)):
        got = read_frames(data)
        assert _numbers(got) == [0] * 8 and all(frame is got[0] for frame in got)


def test_a_video_that_asks_to_be_turned_clockwise(tmp_path):
    path = tmp_path / "video.mp4"
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=24, width=64, height=32, pix_fmt="yuv420p")
        pixels = np.zeros((32, 64, 3), np.uint8)
        pixels[:, :32] = 255  # white on the left
        container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    data = path.read_bytes()
    upright = (0x10000).to_bytes(4) + bytes(12) + (0x10000).to_bytes(4) + bytes(12)
    quarter = bytes(4) + (0x10000).to_bytes(4) + bytes(4) + (-0x10000).to_bytes(4, signed=True) + bytes(16)
    at = data.index(upright, data.index(b"tkhd"))
    (got,) = read_frames(data, 1)
    assert got.shape == (32, 64, 3) and got[:, :24].min() > 200 and got[:, 40:].max() < 50
    (got,) = read_frames(data[:at] + quarter + data[at + 32 :], 1)
    assert got.shape == (64, 32, 3) and got[:24].min() > 200 and got[40:].max() < 50  # white on top


# ---------------------------------------------------------------- what is no whole video


def _cut(data: bytes, places: list[int]) -> set[str]:
    """Why the pieces are refused; a piece that is not gives the whole video's frames."""
    whole, reasons = read_frames(data), set()
    for place in places:
        try:
            got = read_frames(data[:place])
        except VideoError as error:
            reasons.add(error.reason)
        else:
            assert all(np.array_equal(one, other) for one, other in zip(got, whole, strict=True)), place
    return reasons


@pytest.mark.parametrize("name", VIDEOS)
def test_a_cut_video_gives_the_same_frames_or_is_refused(tmp_path, name):
    codec, options = VIDEOS[name]
    data = _video(tmp_path / name, 60, codec, **options)
    chance = random.Random(6)
    places = [chance.randrange(12, len(data)) for _ in range(20)] + [len(data) - 1, len(data) - 9]
    assert _cut(data, places) == {"cut_video"}


def test_a_piece_that_is_announced_but_missing(tmp_path):
    codec, options = VIDEOS["pieces.mp4"]
    data = _video(tmp_path / "pieces.mp4", 60, codec, **options)
    assert _reason(data[: data.rindex(b"mdat") - 4]) == "cut_video"


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_a_cut_animation_gives_the_same_frames_or_is_refused(kind):
    data = _animation(kind, 30)
    assert _cut(data, [*range(12, len(data) - 1, len(data) // 40), len(data) - 1]) <= {"cut_video", "unreadable_video"}
    assert _reason(data[: len(data) // 2]) in ("cut_video", "unreadable_video")


def test_a_hole_in_the_middle_is_noticed(tmp_path):
    """The boxes' lengths are right, but the index speaks of bytes behind the end."""
    data = _video(tmp_path / "video.mp4", 60, movflags="faststart")
    at = data.index(b"mdat") - 4
    half = int.from_bytes(data[at : at + 4]) // 2
    assert _reason(data[:at] + half.to_bytes(4) + data[at + 4 : at + half]) == "cut_video"


def test_no_frames(tmp_path):
    path = tmp_path / "sound.mp4"
    with av.open(path, "w") as container:
        stream = container.add_stream("aac", rate=8000, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    assert _reason(path.read_bytes()) == "no_frames"
    path = tmp_path / "empty.mp4"
    with av.open(path, "w", options={"movflags": "empty_moov"}) as container:
        container.add_stream("mpeg4", rate=24, width=32, height=32, pix_fmt="yuv420p")
        container.start_encoding()
    assert _reason(path.read_bytes()) == "no_frames"


def test_no_video(tmp_path):
    playlist = b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n/etc/passwd\n#EXT-X-ENDLIST\n"
    jpeg = io.BytesIO()
    PIL.new("RGB", (8, 8)).save(jpeg, "JPEG")
    for data in (b"", b"no video", bytes(5000), playlist, jpeg.getvalue(), _video(tmp_path / "a.ts", 5)):
        assert _reason(data) == "unreadable_video"


def test_too_large(tmp_path, monkeypatch):
    path, gif = _video(tmp_path / "video.mp4", 3), _animation("GIF", 3)
    for module in (video, decoding):
        monkeypatch.setattr(module, "MAX_PIXELS", 32 * 48 - 1)
    assert _reason(path) == _reason(gif) == "too_large"
    for module in (video, decoding):
        monkeypatch.setattr(module, "MAX_PIXELS", 32 * 48)
    assert len(read_frames(path)) == len(read_frames(gif)) == 8
    monkeypatch.setattr(video, "MAX_FRAMES", 2)
    assert _reason(path) == _reason(gif) == "too_large"
    monkeypatch.setattr(video, "MAX_BYTES", 100)
    assert _reason(path) == "too_large"


def test_errors_travel_between_processes():
    error = pickle.loads(pickle.dumps(VideoError("cut_video", "3 of 9 frames")))
    assert (error.reason, error.detail, str(error)) == ("cut_video", "3 of 9 frames", "cut_video: 3 of 9 frames")
