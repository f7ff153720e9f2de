"""Frames of videos and animations: a file -> uint8 [H, W, 3] frames, chosen by a rule of `frames.py`, in order of time.

PyAV reads videos (mp4, webm, …), Pillow reads animated GIF, WebP and APNG; the first bytes of a file decide. Only the
wanted frames of a video are held in memory. A truncated file is refused, because other frames of it would be chosen.
"""

from __future__ import annotations

import bisect
import dataclasses
import errno
import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import av
import numpy as np
from PIL import Image as PIL

from emu_jax.data.decoding import MAX_PIXELS, ImageError, check_size, flatten, use_image
from emu_jax.data.frames import FRAMES, frame_indices

MAX_BYTES = 2 << 30
MAX_FRAMES = 1_000_000  # of one video: eleven hours

Choose = Callable[[int], list[int]]  # number of frames -> indices of the wanted ones, ascending

# Formats that state how long the file is. Playlists and the like would make the reader open other files and URLs.
_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi"


class VideoError(ValueError):
    """A file whose wanted frames cannot be read.

    Attributes:
      reason: no_frames, cut_video, unreadable_video or too_large.
      detail: what is wrong, for people.
    """

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail

    def __reduce__(self):
        return VideoError, (self.reason, self.detail)


def read_frames(
    source: Path | bytes, count: int = FRAMES, rule: Callable[[int, int], list[int]] = frame_indices
) -> list[np.ndarray]:
    """Frames of a file or its bytes, uint8 [H, W, 3] each; a frame that is wanted twice is the same array twice.

    Args:
      count: number of frames.
      rule: (number of frames of the video, count) -> indices of the wanted ones, ascending: `frame_indices` or
        `spread_indices`.

    Raises:
      VideoError: the file is not a video, is truncated, has no frames or is too large.
    """

    def choose(frames: int) -> list[int]:
        return rule(frames, count)

    size = len(source) if isinstance(source, bytes) else source.stat().st_size
    if size > MAX_BYTES:
        raise VideoError("too_large", f"{size / 1e9:.1f} GB; expected at most {MAX_BYTES / 1e9:.1f} GB")
    with io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as file:
        head = file.read(12)
        if head[:4] == b"GIF8" or head[:8] == b"\x89PNG\r\n\x1a\n" or (head[:4], head[8:]) == (b"RIFF", b"WEBP"):
            return _animation(file, choose)
        if _ends_early(file, head, size):
            raise VideoError("cut_video", "the file is shorter than it says")
        try:
            return _video(file, choose)
        except VideoError:
            raise
        except (av.error.FFmpegError, ValueError) as error:
            if getattr(error, "errno", None) == errno.EINVAL:
                raise VideoError("unreadable_video", "neither mp4, WebM, Matroska nor AVI") from error
            raise VideoError("unreadable_video", f"{getattr(error, 'strerror', None) or error}") from error


def _check_pixels(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise VideoError(
            "too_large", f"{width} x {height} pixels; expected at most {MAX_PIXELS // 1_000_000} megapixels"
        )


# ---------------------------------------------------------------- videos


@dataclasses.dataclass(frozen=True)
class _Packet:
    """The times of a compressed frame, in the stream's unit."""

    shown: int | None  # pts
    decoded: int | None  # dts
    is_key: bool


def _video(file: BinaryIO, choose: Choose) -> list[np.ndarray]:
    with _open(file) as container:
        packets = _packets(container)
        if not packets:
            raise VideoError("no_frames", "its video track is empty")
        indices = choose(len(packets))
        found = _by_time(container, packets, sorted(set(indices)))
    if found is None:
        # Some packets show nothing (hidden frames of VP8) or have no time: then all frames must be decoded.
        total = sum(1 for _ in _decode(file))
        if not total:
            raise VideoError("no_frames", "no frame of it can be decoded")
        indices = choose(total)
        found = {}
        for index, frame in enumerate(_decode(file)):
            if index in indices:
                found[index] = _pixels(frame)
            if index == indices[-1]:
                break
    return [found[index] for index in indices]


def _open(file: BinaryIO) -> av.container.InputContainer:
    file.seek(0)
    container = av.open(file, "r", options={"format_whitelist": _FORMATS})
    if not container.streams.video:
        container.close()
        raise VideoError("no_frames", "no video track")
    context = container.streams.video[0].codec_context
    try:
        if context is None:
            raise VideoError("unreadable_video", "its codec is unknown")
        _check_pixels(context.width, context.height)
    except VideoError:
        container.close()
        raise
    context.thread_count = 1  # many videos are read in parallel
    return container


def _packets(container: av.container.InputContainer) -> list[_Packet]:
    """Every compressed frame, in the order of the file; nothing is decoded.

    Raises:
      VideoError: there are fewer than the file's header states.
    """
    stream = container.streams.video[0]
    packets: list[_Packet] = []
    read = 0
    for packet in container.demux(stream):
        if packet.dts is None and packet.size == 0:
            continue  # PyAV's end of a track
        if packet.is_corrupt:
            raise VideoError("cut_video", f"broken off after {len(packets)} frames")
        read += 1
        if read > MAX_FRAMES:
            raise VideoError("too_large", f"more than {MAX_FRAMES} frames")
        if not packet.is_discard:  # by an mp4's edit list
            packets.append(_Packet(packet.pts, packet.dts, packet.is_keyframe))
    # Not `stream.frames`: an mp4's header counts frames that its edit list leaves out.
    entries = getattr(stream, "index_entries", ())  # PyAV 15, which lmms-eval requires, has none
    if "mp4" in container.format.name and read < len(entries):
        raise VideoError("cut_video", f"{read} of {len(entries)} frames")
    return packets


def _by_time(
    container: av.container.InputContainer, packets: Sequence[_Packet], indices: Sequence[int]
) -> dict[int, np.ndarray] | None:
    """The frames at `indices` (ascending), found by the times of their packets; None if the times do not suffice."""
    times = sorted(packet.shown for packet in packets if packet.shown is not None)
    if len(set(times)) < len(packets):
        return None
    keys = sorted(
        (packet.shown, packet.decoded)
        for packet in packets
        if packet.is_key and packet.shown is not None and packet.decoded is not None
    )
    stream = container.streams.video[0]
    found: dict[int, np.ndarray] = {}
    frames: Iterator[av.VideoFrame] | None = None
    position = -1  # index in `keys` of the last key frame that the decoder passed
    try:
        for index in indices:
            nearest = bisect.bisect_right(keys, times[index], key=lambda key: key[0]) - 1
            if nearest < 0:
                return None
            if frames is None or nearest > position:  # skips the frames between
                container.seek(keys[nearest][1], stream=stream)
                frames, position = container.decode(stream), nearest
            frame = next((frame for frame in frames if frame.pts is None or frame.pts >= times[index]), None)
            if frame is None or frame.pts != times[index] or frame.is_corrupt:
                return None
            found[index] = _pixels(frame)
    except av.error.FFmpegError:
        return None
    return found


def _decode(file: BinaryIO) -> Iterator[av.VideoFrame]:
    """Every frame, in order."""
    with _open(file) as container:
        for frame in container.decode(container.streams.video[0]):
            if frame.is_corrupt:
                raise VideoError("unreadable_video", f"a damaged frame at {frame.time or 0:.2f} s")
            yield frame


def _pixels(frame: av.VideoFrame) -> np.ndarray:
    """uint8 [H, W, 3], with the rotation that the file states."""
    _check_pixels(frame.width, frame.height)
    return np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90)))


def _ends_early(file: BinaryIO, head: bytes, size: int) -> bool:
    """Whether a video is shorter than its outermost boxes state; False for other formats.

    A missing end is not detected in a WebM of unknown length or in a fragmented mp4.
    """
    if head[4:8] in (b"ftyp", b"moov", b"mdat", b"free", b"wide"):  # mp4; QuickTime's need not begin with ftyp
        position, names = 0, set()
        while position < size:
            file.seek(position)
            header = file.read(16)
            length = int.from_bytes(header[:4], "big")
            if length == 1:
                length = int.from_bytes(header[8:16], "big")
            if length == 0:  # the last box extends to the end
                length = size - position
            if length < 8 or position + length > size:
                return True
            last = header[4:8]
            names.add(last)
            position += length
        # moov, the index of the video, is often written last; the frames that a moof lists follow it.
        return b"moov" not in names or last == b"moof"
    if head[:4] == b"RIFF":
        return int.from_bytes(head[4:8], "little") + 8 > size
    if head[:4] == b"\x1a\x45\xdf\xa3":  # Matroska, WebM: a header, then one segment
        position = 4
        for skip in (True, False):
            file.seek(position)
            length, width = _ebml_length(file.read(8))
            position += width + (length if skip else 0) + (4 if skip else 0)
        return length != (1 << 7 * width) - 1 and position + length > size  # all ones mean unknown
    return False


def _ebml_length(data: bytes) -> tuple[int, int]:
    """Decodes an EBML number, whose leading zero bits state its length; returns it and its length in bytes."""
    width = 9 - data[0].bit_length() if data else 1
    return int.from_bytes(data[:width], "big") & ((1 << 7 * width) - 1), width


# ---------------------------------------------------------------- animations


# Reasons of an image -> those of a video.
_REASONS = {
    "too_many_pixels": "too_large",
    "unsupported_depth": "unreadable_video",
    "unreadable_image": "unreadable_video",
}


def _animation(file: BinaryIO, choose: Choose) -> list[np.ndarray]:
    def frames(image: PIL.Image) -> list[np.ndarray]:
        total = getattr(image, "n_frames", 1)
        if total > MAX_FRAMES:
            raise ImageError("too_large", "", f"more than {MAX_FRAMES} frames")
        indices = choose(total)
        wanted, found = set(indices), {}
        # Not straight to the wanted ones: each frame of a GIF may make the image larger, and is decoded on the way. A
        # GIF does not state its number of frames, so the last one is decoded, too: its end shows that none is missing.
        for index in range(total):
            image.seek(index)
            check_size(image, "")
            if index in wanted:
                found[index] = flatten(image)
        image.load()
        if image.format == "GIF":
            file.seek(-1, io.SEEK_END)
            if file.read(1) != b";":
                raise ImageError("cut_video", "", "the GIF's end is missing")
        return [found[index] for index in indices]

    try:
        return use_image(file, "", frames, animated=True)
    except ImageError as error:
        detail = "not a whole animation" if error.reason == "unreadable_image" else error.detail
        raise VideoError(_REASONS.get(error.reason, error.reason), detail) from error
