"""Subtitles: WebVTT, SRT, YouTube's json3 and transcripts -> cues, sorted by start.

    a file's bytes and name ─ parse ─ Subtitles(cues, skipped)

A cue's text is one line of plain text: tags are removed, entities resolved, and white space is collapsed. Cues without
text are left out. Blocks that are not cues are skipped and counted, except comments, styles and headers.
"""

from __future__ import annotations

import dataclasses
import html
import itertools
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence

SUFFIXES = (".json3", ".vtt", ".srt", ".json")


class SubtitleError(ValueError):
    """A file without subtitles of the expected format."""


@dataclasses.dataclass(frozen=True)
class Cue:
    """The text that is spoken from `start` to `end`, in seconds."""

    start: float
    end: float
    text: str


@dataclasses.dataclass(frozen=True)
class Subtitles:
    """The cues sorted by start, and the number of blocks that could not be read."""

    cues: tuple[Cue, ...]
    skipped: int = 0


@dataclasses.dataclass(frozen=True)
class _Block:
    """A cue with its lines as they are shown."""

    start: float
    end: float
    lines: tuple[str, ...]


def parse(data: bytes, name: str) -> Subtitles:
    """The cues of a file, whose format follows from the suffix of its name (`SUFFIXES`).

    >>> parse(b"WEBVTT\\n\\n00:01.000 --> 00:02.500\\n<i>Rain &amp; wind</i>\\n", "video.vtt").cues
    (Cue(start=1.0, end=2.5, text='Rain & wind'),)

    Raises:
      SubtitleError: the file does not have this format.
    """
    suffix = next((suffix for suffix in SUFFIXES if name.lower().endswith(suffix)), None)
    if suffix is None:
        raise SubtitleError(f"{name}: expected a name that ends in {', '.join(SUFFIXES)}")
    parser: Callable[[str], Iterator[_Block | None]] = _json if suffix.startswith(".json") else _text
    blocks, skipped = [], 0
    for block in parser(_decode(data)):
        if block is None:
            skipped += 1
        else:
            blocks.append(block)
    blocks.sort(key=lambda block: block.start)
    cues = (Cue(block.start, block.end, " ".join(block.lines)) for block in _unroll(blocks))
    return Subtitles(tuple(cue for cue in cues if cue.text), skipped)


def _decode(data: bytes) -> str:
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return data.decode("utf-16", errors="replace")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:  # old SRT files
        return data.decode("cp1252", errors="replace")


# ---------------------------------------------------------------- WebVTT and SRT

_TIME = r"(?:([0-9]{1,4}):)?([0-9]{1,2}):([0-9]{2})[.,]([0-9]{1,3})"
_TIMING = re.compile(rf"\s*{_TIME}\s*-->\s*{_TIME}(?:\s.*)?")
# <i>, </font>, <c.yellow>, <v Roger>, <00:00:01.500>; SRT's {\an8}. A lone "<" is text.
_TAG = re.compile(r"</?[A-Za-z][^<>]*>|<(?:\d+:)?\d{1,2}:\d{2}[.,]\d{3}>|\{\\[^{}]*\}")
_NO_CUES = ("WEBVTT", "NOTE", "STYLE", "REGION")


def _seconds(hours: str | None, minutes: str, seconds: str, fraction: str) -> float:
    whole = (int(hours or 0) * 60 + int(minutes)) * 60 + int(seconds)
    return (whole * 1000 + int(fraction.ljust(3, "0"))) / 1000


def _text(text: str) -> Iterator[_Block | None]:
    """Reads both formats, which differ in the separator of their times and in what may surround the cues."""
    # An empty line ends a block; a line of spaces, as in YouTube's rolling captions, does not.
    for block in re.split(r"\n{2,}", text.replace("\r\n", "\n").replace("\r", "\n").strip("\n")):
        lines = block.split("\n")
        if not block.strip() or re.match(rf"(?:{'|'.join(_NO_CUES)})(?:\s|$)", lines[0]):
            continue
        # The times come first, or after a line with the cue's number or name.
        matches = enumerate(map(_TIMING.fullmatch, lines[:2]))
        timing, found = next(((number, match) for number, match in matches if match), (0, None))
        if found is None or any(_TIMING.fullmatch(line) for line in lines[timing + 1 :]):
            yield None
            continue
        times = found.groups()
        start, end = _seconds(*times[:4]), _seconds(*times[4:])
        yield _Block(start, end, _lines(lines[timing + 1 :])) if start <= end else None


def _lines(lines: Sequence[str]) -> tuple[str, ...]:
    plain = (" ".join(html.unescape(_TAG.sub("", line)).split()) for line in lines)
    return tuple(line for line in plain if line)


# ---------------------------------------------------------------- JSON


def _json(text: str) -> Iterator[_Block | None]:
    """Reads YouTube's json3, {"events": [{"tStartMs", "dDurationMs", "segs": [{"utf8"}]}]}, or a transcript of
    youtube-transcript-api, [{"start", "duration", "text"}].
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SubtitleError(f"not JSON ({error})") from error
    events = content.get("events") if isinstance(content, dict) else content
    if not isinstance(events, list):
        raise SubtitleError('expected {"events": […]} or a list of cues')
    for event in events:
        try:
            if isinstance(content, list):
                start, length, said = float(event["start"]), float(event["duration"]), event["text"]
                end = start + length
            elif "segs" not in event:
                continue  # a window of the player
            else:
                start, length = event["tStartMs"] / 1000, event.get("dDurationMs", 0) / 1000
                end = (event["tStartMs"] + event.get("dDurationMs", 0)) / 1000
                said = "".join(segment["utf8"] for segment in event["segs"])
            if length < 0 or not math.isfinite(end):
                raise ValueError("a cue without a time")
            lines = said.splitlines()
            # Only transcripts have entities; json3 holds the text as it is shown.
            plain = _lines(lines) if isinstance(content, list) else tuple(" ".join(line.split()) for line in lines)
            yield _Block(start, end, tuple(line for line in plain if line))
        except (TypeError, KeyError, ValueError, AttributeError, OverflowError):
            yield None


# ---------------------------------------------------------------- rolling captions


def _unroll(blocks: Sequence[_Block]) -> Iterator[_Block]:
    """Removes the repeated lines of rolling captions, in which each cue shows the previous line above the new one.

    Lines that are only spoken twice are kept: a track counts as rolling if at least half of its cues begin with the
    lines that end the cue before, and some of these cues add lines.
    """
    spoken = [block for block in blocks if block.lines]
    repeats = [_repeated(before.lines, after.lines) for before, after in itertools.pairwise(spoken)]
    adds = any(0 < count < len(block.lines) for count, block in zip(repeats, spoken[1:], strict=False))
    if not adds or 2 * sum(count > 0 for count in repeats) < len(repeats):
        yield from spoken
        return
    for block, count in zip(spoken, [0, *repeats], strict=True):
        yield dataclasses.replace(block, lines=block.lines[count:])


def _repeated(before: tuple[str, ...], after: tuple[str, ...]) -> int:
    """The number of lines at the end of one cue with which the next begins."""
    return next((n for n in range(min(len(before), len(after)), 0, -1) if before[-n:] == after[:n]), 0)
