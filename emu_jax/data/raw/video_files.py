"""Videos beside raw data: finding a file that untrusted text names, and the frames that are stored of it."""

from __future__ import annotations

from pathlib import Path

from emu_jax.data.frames import spread_indices
from emu_jax.data.raw.files import Skip, relative_name
from emu_jax.data.raw.reader import RawImage
from emu_jax.data.video import VideoError, read_frames

# A name is tried as it is, then with these: Video-ChatGPT's names have no suffix.
SUFFIXES = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".gif", ".webp")


def find_video(folder: Path, name: object) -> Path:
    """The video `name` under `folder` or directly in it, with or without its suffix.

    Raises:
      Skip: there is none, or the name leads out of the folder.
    """
    inside = relative_name(name, "video")
    shown = ascii(name)[:200]
    for place in dict.fromkeys((str(inside), inside.name)):
        for suffix in ("", *SUFFIXES):
            try:
                if (path := folder / (place + suffix)).is_file():
                    return path
            except (OSError, ValueError) as error:
                raise Skip("missing_video", f"{shown} is not a file name ({type(error).__name__})") from error
    raise Skip("missing_video", f"no video {shown}, nor with one of the suffixes {', '.join(SUFFIXES)}")


def stored_frames(path: Path, count: int) -> list[RawImage]:
    """`count` frames spread over a video, or all frames of a shorter one.

    Raises:
      Skip: the file cannot be read as a video.
    """
    try:
        return [RawImage(frame) for frame in read_frames(path, count, spread_indices)]
    except VideoError as error:
        raise Skip(error.reason, f"{path.name}: {error.detail}") from error
    except OSError as error:
        raise Skip("unreadable_video", f"{path.name}: {error.strerror}") from error
