"""The process that decodes uploads: without JAX, with bounded memory, and to be ended at any time (`decoders.py`).

    stdin   Request, an encoded file      stdout   READY, then for each file: Reply, pixels or what is wrong

It ends with its standard input. Whatever libraries print is dropped once it is ready.
"""

from __future__ import annotations

import os
import struct
import sys
from typing import BinaryIO

import numpy as np

from emu_jax.data.decoding import ImageError
from emu_jax.data.images import decode_image, load_image, resize

READY = b"+"
REQUEST = struct.Struct("<?IQ")  # whether it is a video, the pixels of a side, the file's bytes
REPLY = struct.Struct("<BQ")  # one of the next four, the bytes that follow
PIXELS, UNREADABLE, TOO_LARGE, FAILED = range(4)
MAX_DETAIL_BYTES = 2000
VIDEO_IMAGES = 8  # frames of a video that are shown to the model


def bound_memory(count: int) -> bool:
    """Limits this process's address space to `count` bytes; False where the system cannot (Windows, macOS)."""
    if not sys.platform.startswith("linux"):
        return False
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (count, count))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    return True


def decode(data: bytes, size: int, *, is_video: bool) -> tuple[int, bytes]:
    """An encoded file -> PIXELS and uint8 [N, size, size, 3], or another word of `REPLY` and what is wrong."""
    try:
        images = [decode_image(data, "")] if not is_video else _frames(data)
        return PIXELS, np.stack([resize(image, size) for image in images]).tobytes()
    except ImageError as error:
        return UNREADABLE, error.detail.encode(errors="replace")[:MAX_DETAIL_BYTES]
    except MemoryError:
        return TOO_LARGE, b""
    except Exception as error:  # whatever the decoder raises, this process ends and is replaced
        return FAILED, type(error).__name__.encode()[:MAX_DETAIL_BYTES]


def _frames(data: bytes) -> list[np.ndarray]:
    try:
        from emu_jax.data.video import VideoError, read_frames
    except ModuleNotFoundError:
        raise ImageError("no_reader", "", "videos are read by PyAV, which is missing; pip install av") from None
    try:
        return [load_image(frame) for frame in read_frames(data, VIDEO_IMAGES)]
    except VideoError as error:
        raise ImageError(error.reason, "", f"{error.detail}; expected a whole video or animation") from error


def _serve(requests: BinaryIO, replies: BinaryIO) -> None:
    while head := requests.read(REQUEST.size):
        is_video, size, count = REQUEST.unpack(head)
        word, content = decode(requests.read(count), size, is_video=is_video)
        replies.write(REPLY.pack(word, len(content)) + content)
        replies.flush()
        if word in (TOO_LARGE, FAILED):  # what the library holds now is unknown: a new process replaces this one
            return


def main() -> None:
    """`python -m emu_jax.serve.decoding_worker BYTES`, with at most so many bytes of memory."""
    replies = os.fdopen(os.dup(1), "wb")
    bound_memory(int(sys.argv[1]))
    try:
        from PIL import AvifImagePlugin

        AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # each thread reserves address space
    except ImportError:  # before Pillow 11.3
        pass
    replies.write(READY)
    replies.flush()
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    _serve(sys.stdin.buffer, replies)


if __name__ == "__main__":
    main()
