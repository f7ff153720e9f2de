"""Subtitles: WebVTT, SRT, TTML, YouTube's json3 and transcripts -> cues, sorted by start.

    a file's bytes and name ─ parse ─ Subtitles(cues, skipped)

A cue's text is one line of plain text: tags and the readings of ruby are removed, entities resolved, and white space is
collapsed. Cues without text are left out. Blocks that are not cues are skipped and counted, except comments, styles and
headers.

`docs/data-formats.md` says why WebVTT and SRT are not read by webvtt-py or pysubs2.
"""

from __future__ import annotations

import dataclasses
import html
import itertools
import json
import math
import re
from collections.abc import Iterator, Sequence

from emu_jax.data.raw.invisible import INVISIBLE
from emu_jax.data.raw.ttml import NotTimedText, read_ttml

SUFFIXES = (".json3", ".vtt", ".srt", ".ttml", ".json")

Spoken = tuple[float, float, str]  # start and end in seconds, the lines that are shown


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
      SubtitleError: the file does not have this format, or its encoding is not known.
    """
    suffix = next((suffix for suffix in SUFFIXES if name.lower().endswith(suffix)), None)
    if suffix is None:
        raise SubtitleError(f"{name}: expected a name that ends in {', '.join(SUFFIXES)}")
    blocks, skipped = [], 0
    for found in _found(data, suffix):
        if found is None or not 0 <= found[0] <= found[1] < math.inf:
            skipped += 1
            continue
        start, end, said = found
        lines = (" ".join(line.split()) for line in said.translate(INVISIBLE).split("\n"))
        blocks.append(_Block(start, end, tuple(line for line in lines if line)))
    blocks.sort(key=lambda block: block.start)
    cues = (Cue(block.start, block.end, " ".join(block.lines)) for block in _unroll(blocks))
    return Subtitles(tuple(cue for cue in cues if cue.text), skipped)


def _found(data: bytes, suffix: str) -> Iterator[Spoken | None]:
    """What is spoken, in the file's order; None for what cannot be read."""
    if suffix == ".ttml":
        try:
            yield from read_ttml(data)
        except NotTimedText as error:
            raise SubtitleError(str(error)) from error
    elif suffix.startswith(".json"):
        yield from _json(_decode(data))
    else:
        yield from _text(_decode(data), suffix == ".srt")


def _decode(data: bytes) -> str:
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        text = data.decode("utf-16", errors="replace")
    else:
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError:  # old SRT files
            text = data.decode("cp1252", errors="replace")
            letters = [character for character in text if character.isalpha() or character == "\ufffd"]
            # Western languages have few accents. Any other alphabet, read so, is little else.
            if 2 * sum(character > "\x7f" for character in letters) > len(letters):
                raise SubtitleError("neither UTF-8 nor Windows-1252; convert it to UTF-8") from None
    return text.replace("\ufeff", "")


# ---------------------------------------------------------------- WebVTT and SRT

# Hours and fractions may be missing, and converters write spaces between the numbers.
_TIME = r"(?:([0-9]{1,6})\s*:\s*)?([0-9]{1,2})\s*:\s*([0-9]{1,2})(?:\s*[.,]\s*([0-9]{1,3})[0-9]*)?"
_TIMING = re.compile(rf"\s*{_TIME}\s*-{{1,2}}>\s*{_TIME}(?:\s.*)?")
_BROKEN_TIMING = re.compile(r"\s*-?[0-9]+:.*-->.*")
_CUT_TIMING = re.compile(r"\s*[0-9]+:[\s0-9:.,>-]*")
_NUMBER = re.compile(r"\s*[0-9]+\s*")
_NO_CUE = re.compile(r"(?:WEBVTT|NOTE|STYLE|REGION)(?:\s|$)")

_READING = re.compile(r"<rt\b[^<>]*>.*?(?=</rt>|</ruby>|\Z)", re.DOTALL)  # how to say what is written
# <i>, </font>, <c.yellow>, <v Roger>, <00:00:01.500>; SRT's {\an8}, {y:i}. A lone "<" is text.
_TAG = re.compile(r"</?[A-Za-z][^<>]*>|<(?:\d+:)?\d{1,2}:\d{2}[.,]\d{3}>|\{\\[^{}]*\}|\{[yYcCsSfF]:[^{}]*\}")
_CUT_TAG = re.compile(r"</?[A-Za-z][^<>\n]*\Z")


def _text(text: str, is_srt: bool) -> Iterator[Spoken | None]:
    """Reads both formats. A line of times begins a cue wherever it is, as in browsers."""
    ends_alike = "\n".join(line.rstrip("\r") for line in _CUT_TAG.sub("", text).split("\n"))  # some end in CR CR LF
    lines = ends_alike.replace("\r", "\n").split("\n")
    found = [(number, match.groups()) for number, line in enumerate(lines) if (match := _TIMING.fullmatch(line))]
    ends = [number for number, _ in found]
    _, unread = _between(lines[: ends[0] if ends else None], is_srt, in_cue=False, at_end=not ends)
    yield from [None] * unread
    for (number, times), end in zip(found, [*ends, None][1:], strict=True):
        said, unread = _between(lines[number + 1 : end], is_srt, in_cue=True, at_end=end is None)
        yield _seconds(*times[:4]), _seconds(*times[4:]), _plain(said)
        yield from [None] * unread


def _between(lines: Sequence[str], is_srt: bool, *, in_cue: bool, at_end: bool) -> tuple[str, int]:
    """A cue's text, and the number of blocks after it that are neither text nor comments.

    An empty line ends a text of WebVTT, while texts of SRT may hold some. A line of spaces, as in YouTube's rolling
    captions, ends none.

    Args:
      lines: those between two lines of times.
      in_cue: whether there are times above the lines.
      at_end: whether there are no times below them.
    """
    blocks: list[list[str]] = [[]] if in_cue else [[], []]
    for line in lines:
        if not line:
            blocks.append([])
            continue
        if _BROKEN_TIMING.fullmatch(line):
            if blocks[-1] and _NUMBER.fullmatch(blocks[-1][-1]):
                blocks[-1].pop()
            blocks.append([])
        blocks[-1].append(line)
    adjoins = not at_end and bool(blocks[-1])
    said, *others = blocks
    others = [block for block in others if any(line.strip() for line in block)]
    last = others[-1] if others else said
    is_alone = bool(others) and len(last) == 1
    if last and (adjoins or is_alone) and (_NUMBER.fullmatch(last[-1]) or (adjoins and is_alone)):
        del last[-1]  # the next cue's number or name

    unread = 0
    for block in filter(None, others):
        if _NO_CUE.match(block[0]):
            continue
        is_broken = any(map(_BROKEN_TIMING.fullmatch, block[:2]))
        is_broken |= len(block) > 1 and bool(_NUMBER.fullmatch(block[0]))  # its times are missing
        is_broken |= at_end and block is last and any(map(_CUT_TIMING.fullmatch, block[:2]))
        in_cue &= is_srt and not is_broken
        if in_cue:
            said += block
        else:
            unread += 1
    return "\n".join(said).replace(r"\N" if is_srt else "\r", "\n"), unread


def _seconds(hours: str | None, minutes: str, seconds: str, fraction: str | None) -> float:
    whole = (int(hours or 0) * 60 + int(minutes)) * 60 + int(seconds)
    return (whole * 1000 + int((fraction or "").ljust(3, "0"))) / 1000


def _plain(text: str) -> str:
    return html.unescape(_TAG.sub("", _READING.sub("", text)))


# ---------------------------------------------------------------- JSON


def _json(text: str) -> Iterator[Spoken | None]:
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
                start = float(event["start"])
                # Only transcripts have entities; json3 holds the text as it is shown.
                yield start, start + float(event["duration"]), _plain(event["text"])
            elif "segs" in event:  # others are windows of the player
                start, length = event["tStartMs"], event.get("dDurationMs", 0)
                said = "".join(segment["utf8"] for segment in event["segs"])
                yield start / 1000, (start + length) / 1000, said
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
