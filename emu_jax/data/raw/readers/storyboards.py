"""Storyboards: a video's thumbnails at a fixed interval and its subtitles, interleaved by time.

Two layouts are read, each in the folder itself or in its subfolders:

    <key>.json, <key>_0.webp, <key>_1.webp, …    YT-Storyboard-1B's: sheets of thumbnails. The JSON holds the video's
                                                 "url" and, in "yt_meta_dict"/"sb", [width, height, columns, rows,
                                                 frames, type] for each sheet. Subtitles and durations are in folders
                                                 of their own, named by the video's id.
    *.jpg|png|webp, *.vtt|srt|ttml|json3, *.json one folder per video: frames in the order of the numbers in their
                                                 names, subtitles, and a JSON that holds "duration", in seconds.

The order is the reference's (`Emu1/data/yt-sb-1b/video_webdataset_maker_YT1b_sb.py`): frame i has time i * interval, a
subtitle the time of its start, and a frame precedes a subtitle of the same time. Subtitles between two frames are
joined by spaces into one text. Subtitles after the last frame are kept.

The language of subtitles is in their name, as in `talk.de.vtt` and `talk.en-GB.vtt` (`languages.py`).
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import re
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from emu_jax.data.document import Text
from emu_jax.data.images import decode_image
from emu_jax.data.raw.files import LOCAL, Skip
from emu_jax.data.raw.languages import choose_subtitles, stated_language
from emu_jax.data.raw.reader import RawDocument, RawImage, Reject
from emu_jax.data.raw.subtitles import SUFFIXES, Cue, SubtitleError, Subtitles, parse
from emu_jax.errors import UserError
from emu_jax.storage import check_local

IMAGES = (".jpg", ".jpeg", ".png", ".webp")
SAID = (".vtt", ".srt", ".ttml", ".json3")  # in a video's folder, where .json is about the video
FILES = IMAGES + SAID
MAX_SHEETS = 100  # the reference's
MAX_FRAMES = 10_000
MAX_BYTES = 1 << 30  # of a video's frames in memory

_SHEET = re.compile(r"(.+)_0\.webp")
_WATCH = "https://www.youtube.com/watch?v="


class Video(NamedTuple):
    """One video as it is found.

    Attributes:
      frames, interval: its frames, and the seconds between two of them.
      unused: names of its other subtitles.
    """

    frames: list[RawImage]
    interval: float
    subtitles: Subtitles
    unused: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Storyboards:
    """One document per video.

    Attributes:
      subtitles: folder of `<id>.json` (or .json3, .vtt, .srt, .ttml; or `<id>.en.json` and so on) for sheets; "" is
        `subtitle` beside the shard's folder.
      labels: folder of `<id>.json` with the "duration" of the sheets' videos; "" is `label` beside the shard's folder.
        A duration that is missing there is read from the sheets' own JSON.
      language: language of the subtitles that are read, as `en` or `pt-BR`, where their names state one. Subtitles
        whose names state none are read where none of this language are. "" reads the first, whatever its language.
    """

    about: ClassVar[str] = "frames at a fixed interval, and subtitles"
    kind: ClassVar[str] = "storyboard"
    subtitles: str = ""
    labels: str = ""
    language: str = "en"

    def shards(self, path: str) -> list[str]:
        """The folder itself if it holds videos, otherwise those of its subfolders that do."""
        for folder in (self.subtitles, self.labels):
            check_local(folder, LOCAL)
        root = check_local(path, LOCAL)
        if not root.is_dir():
            raise UserError(f"{path}: no such folder; expected one of storyboards")
        if _holds_video(root):
            return [str(root)]
        apart = self._said_beside(root / "any")  # subtitles of sheets, which are no video of their own
        folders = [folder for folder in sorted(root.iterdir()) if folder.is_dir()]
        found = [str(folder) for folder in folders if _holds_video(folder, IMAGES if folder == apart else FILES)]
        if not found:
            raise UserError(
                f"{path}: no storyboards here; expected <key>.json beside <key>_0.webp, or one folder per video "
                "with images, .vtt, .srt, .ttml or .json3 subtitles and a .json that holds its duration"
            )
        return found

    def read(self, shard: str) -> Iterator[RawDocument | Reject]:
        folder = Path(shard)
        names = _names(folder)
        boards = _boards(names)
        if not boards:
            yield from _document(folder.name, lambda: _folder(folder, names, self.language))
        if boards:
            said = self._said_beside(folder)
            tracks = _tracks(said, {video for board in boards if (video := _video_of(folder, board))})
        for board in boards:
            yield from _document(f"{folder.name}/{board}", functools.partial(self._sheets, folder, board, said, tracks))

    def _said_beside(self, folder: Path) -> Path:
        """The folder of the subtitles of a folder of sheets."""
        return Path(self.subtitles) if self.subtitles else folder.parent / "subtitle"

    def _sheets(self, folder: Path, board: str, said: Path, tracks: Mapping[str, Sequence[str]]) -> Video:
        """One video of the reference's layout."""
        content = _json(folder / f"{board}.json")
        meta = content.get("yt_meta_dict")
        labels = meta.get("sb") if isinstance(meta, dict) else None
        video = _video_id(content)
        if not isinstance(labels, dict) or not video:
            raise Skip("unreadable_json", f"{board}.json: expected url and yt_meta_dict/sb")
        names = tracks.get(video)
        if not names:
            raise Skip("no_subtitles", f"no {video}.json nor {video}.{self.language or 'en'}.json among the subtitles")
        name = choose_subtitles(names, self.language)
        subtitles = _subtitles(said / name)
        label = (Path(self.labels) if self.labels else folder.parent / "label") / f"{video}.json"
        labelled = [_json(label)] if label.is_file() else []
        duration = _duration([*labelled, content, meta.get("info") if isinstance(meta, dict) else None])
        frames, count = _cut_sheets(folder, board, labels)
        # YouTube's intervals are whole seconds; for a video of less than half a second per frame that would be 0.
        interval = round(duration / count) or duration / count
        return Video(frames, interval, subtitles, tuple(other for other in names if other != name))


def interleave(frames: Sequence[RawImage], interval: float, cues: Sequence[Cue]) -> tuple[Text | RawImage, ...]:
    """Frames and subtitles in the order of time; a frame comes after the text that starts before it.

    >>> frames = [RawImage(b"0 s"), RawImage(b"2 s"), RawImage(b"4 s")]
    >>> parts = interleave(frames, 2.0, [Cue(0.5, 1.0, "It"), Cue(1.0, 2.0, "rains."), Cue(4.5, 5.0, "End")])
    >>> [part.text if isinstance(part, Text) else part.data for part in parts]
    [b'0 s', 'It rains.', b'2 s', b'4 s', 'End']
    """
    moments: list[tuple[float, RawImage | str]] = [(i * interval, frame) for i, frame in enumerate(frames)]
    moments += [(cue.start, cue.text) for cue in cues]
    moments.sort(key=lambda moment: moment[0])  # a stable sort: frames come first
    parts: list[Text | RawImage] = []
    said: list[str] = []
    for _, what in [*moments, (math.inf, None)]:
        if isinstance(what, str):
            said.append(what)
            continue
        if said:
            parts.append(Text(" ".join(said)))
            said = []
        if what is not None:
            parts.append(what)
    return tuple(parts)


def _document(key: str, make: Callable[[], Video]) -> Iterator[RawDocument | Reject]:
    try:
        frames, interval, subtitles, unused = make()
        if not subtitles.cues:
            raise Skip("no_subtitles", "its subtitles are empty")
    except Skip as skip:
        yield skip.reject(key)
        return
    except OSError as error:
        yield Reject(key, "unreadable_file", f"{Path(error.filename or key).name}: {error.strerror}")
        return
    for name in unused:
        yield Reject(f"{key}#{name}", "other_subtitles", "other subtitles of the video are read", whole=False)
    if subtitles.skipped:
        yield Reject(f"{key}#subtitles", "malformed_cue", f"{subtitles.skipped} blocks are not cues", whole=False)
    yield RawDocument(key, "storyboard", interleave(frames, interval, subtitles.cues))


# ---------------------------------------------------------------- folders


def _names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.is_file() and not entry.name.startswith("."))


def _boards(names: Sequence[str]) -> list[str]:
    """The keys that have sheets and a JSON."""
    known = set(names)
    return [m[1] for m in map(_SHEET.fullmatch, names) if m and f"{m[1]}.json" in known]


def _holds_video(folder: Path, suffixes: tuple[str, ...] = FILES) -> bool:
    return any(name.lower().endswith(suffixes) for name in _names(folder))


def _folder(folder: Path, names: Sequence[str], language: str) -> Video:
    """A folder that is one video."""
    images = [name for name in names if name.lower().endswith(IMAGES)]
    # Sorted by number: frame_9 before frame_10.
    images.sort(key=lambda name: [(len(part), part) if part.isdigit() else (0, part) for part in _numbered(name)])
    said = [name for name in names if name.lower().endswith(SAID)]
    if not images:
        raise Skip("no_image", f"no {', '.join(IMAGES)} in the folder")
    if not said:
        raise Skip("no_subtitles", f"no {', '.join(SAID)} in the folder")
    chosen = choose_subtitles(said, language)
    subtitles = _subtitles(folder / chosen)
    duration = _duration([_json(folder / name) for name in names if name.lower().endswith(".json")])
    size = sum((folder / name).stat().st_size for name in images)
    if len(images) > MAX_FRAMES or size > MAX_BYTES:
        raise Skip("too_large", f"{len(images)} frames of {size / 1e6:.0f} MB")
    frames = [RawImage((folder / name).read_bytes()) for name in images]
    return Video(frames, duration / len(frames), subtitles, tuple(name for name in said if name != chosen))


def _numbered(name: str) -> list[str]:
    """frame_010.jpg -> "frame_", "10", ".jpg"; every other part is a number."""
    parts = re.split(r"([0-9]+)", name)
    return [part.lstrip("0") or "0" if number % 2 else part for number, part in enumerate(parts)]


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise Skip("unreadable_json", f"{path.name}: {error}") from error
    if not isinstance(content, dict):
        raise Skip("unreadable_json", f"{path.name}: expected an object")
    return content


def _duration(contents: Sequence[Any]) -> float:
    """The first duration that one of the objects states, in seconds."""
    for content in contents:
        value = content.get("duration") if isinstance(content, dict) else None
        if isinstance(value, int | float) and 0 < value < math.inf:
            return float(value)
    raise Skip("no_duration", 'no JSON with "duration", a number of seconds above 0')


def _subtitles(path: Path) -> Subtitles:
    try:
        return parse(path.read_bytes(), path.name)
    except SubtitleError as error:
        raise Skip("unreadable_subtitles", f"{path.name}: {error}") from error


# ---------------------------------------------------------------- sheets


def _video_id(content: Mapping[str, Any]) -> str:
    """The id of the video that a board's JSON is about; "" if there is none."""
    url = content.get("url")
    video = url.removeprefix(_WATCH) if isinstance(url, str) else ""
    return video if re.fullmatch(r"[\w-]+", video) else ""


def _video_of(folder: Path, board: str) -> str:
    try:
        return _video_id(_json(folder / f"{board}.json"))
    except (Skip, OSError):
        return ""  # the board is rejected when its turn comes


def _tracks(folder: Path, videos: Container[str]) -> dict[str, list[str]]:
    """The names of subtitles by video: `<id>.json`, `<id>.de.vtt`; the folder may hold millions of other videos'."""
    tracks: dict[str, list[str]] = {}
    if not folder.is_dir():
        return tracks
    for entry in os.scandir(folder):
        video, _, rest = entry.name.partition(".")
        if video not in videos or not entry.name.lower().endswith(SUFFIXES) or not entry.is_file():
            continue
        # Other files have such names too: <id>.info.json, <id>.live_chat.json.
        if "." not in rest or stated_language(entry.name).tag:
            tracks.setdefault(video, []).append(entry.name)
    return {video: sorted(names) for video, names in tracks.items()}


def _cut_sheets(folder: Path, board: str, labels: dict[str, Any]) -> tuple[list[RawImage], int]:
    """The frames of a video's sheets, and their number by the labels, which divides the duration."""
    frames: list[np.ndarray] = []
    count = size = 0
    for number in range(MAX_SHEETS):
        path = folder / f"{board}_{number}.webp"
        if not path.is_file():
            break
        label = labels.get(str(number))
        grid = label[2:5] if isinstance(label, list) else []
        if len(grid) != 3 or not all(type(n) is int and 0 < n <= MAX_FRAMES for n in grid):
            raise Skip("unreadable_json", f"{board}.json: sheet {number} has no columns, rows and frames")
        columns, rows, filled = grid
        try:
            pixels = decode_image(path.read_bytes(), path.name)
        except UserError as error:
            raise Skip("unreadable_image", f"{error}") from error
        height, width = pixels.shape[:2]
        if height % rows or width % columns:
            raise Skip(
                "unreadable_image",
                f"{path.name}: {width} x {height} pixels are not {columns} x {rows} equal frames",
            )
        size += pixels.size
        count += filled
        if size > MAX_BYTES or count > MAX_FRAMES:
            raise Skip("too_large", f"{count} frames of {size / 1e6:.0f} MB in {number + 1} sheets")
        cells = pixels.reshape(rows, height // rows, columns, width // columns, 3).transpose(0, 2, 1, 3, 4)
        frames.extend(cells.reshape(rows * columns, height // rows, width // columns, 3))
    return [RawImage(frame) for frame in frames[:count]], count


READER = Storyboards
