"""Small videos and animations, written for tests."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image as PIL


def write_video(path: Path, images: Sequence[np.ndarray]) -> None:
    """uint8 [H, W, 3] each, 8 a second, by the codec that goes with the suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    codec = {".webm": "libvpx", ".avi": "mpeg4"}.get(path.suffix, "libx264")
    height, width = images[0].shape[:2]
    with av.open(path, "w") as container:
        stream = container.add_stream(codec, rate=Fraction(8), width=width, height=height, pix_fmt="yuv420p")
        for pixels in images:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


def grey_video(path: Path, frames: int = 16) -> None:
    """Frame i is grey 40 + 8 i."""
    write_video(path, [np.full((32, 48, 3), 40 + 8 * index, np.uint8) for index in range(frames)])


def grey_animation(path: Path, frames: int = 16) -> None:
    """The same as an animated WebP."""
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [PIL.new("RGB", (24, 16), (40 + 8 * index,) * 3) for index in range(frames)]
    images[0].save(path, save_all=True, append_images=images[1:], lossless=True)
