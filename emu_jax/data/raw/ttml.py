"""TTML, the XML of subtitles (https://www.w3.org/TR/ttml2/), as YouTube and broadcasters write it -> what is spoken.

    <p begin="00:00:01.000" dur="1.5s">Rain<br/>falls</p> ─ read_ttml ─ (1.0, 2.5, "Rain\\nfalls")

Times are clocks, with frames or without, or offsets in h, m, s, ms, f (frames) and t (ticks). Those of a `p` count from
the begin of the `body` and the `div` around it. Sequences (timeContainer="seq") are not read as such.
"""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as xml
from collections.abc import Iterator
from typing import Any

_CLOCK = re.compile(r"(?:(?:([0-9]{1,6}):)?([0-9]{1,2}):)?([0-9]{1,2}(?:\.[0-9]{1,9})?)(?::([0-9]{2,9}))?")
_OFFSET = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,9})?)(h|ms|m|s|f|t)")
_PARAMETER = "{http://www.w3.org/ns/ttml#parameter}"
_RUBY = "{http://www.w3.org/ns/ttml#styling}ruby"
_LINE_BREAK = "\0"  # which XML cannot hold; those of the file are spaces


class NotTimedText(ValueError):
    """A file that is not TTML."""


def read_ttml(data: bytes) -> Iterator[tuple[float, float, str] | None]:
    """(start, end, text) of each `p` in seconds, NaN where a time cannot be read; None for the end of a cut file.

    Raises:
      NotTimedText: the file is not XML, or its root is not `tt`.
    """
    parser: Any = xml.XMLPullParser(("start", "end"))  # its types hold for other events too
    event: str
    element: xml.Element
    units: dict[str, float] = {}
    begins = [0.0]  # of the open elements, as seconds of the video
    try:
        parser.feed(data)
        for event, element in parser.read_events():
            name = element.tag.rpartition("}")[2]
            if event == "start":
                if not units:
                    if name != "tt":
                        raise NotTimedText(f"its root is {ascii(name)[:80]}; expected TTML's tt")
                    units = _units(element)
                begins.append(begins[-1] + _seconds(element.get("begin", "0s"), units))
                continue
            begin = begins.pop()
            if name == "br":
                element.text = _LINE_BREAK
            elif element.get(_RUBY) in ("text", "textContainer", "delimiter"):  # how to say what is written
                element.clear()
            elif name == "p":
                said = "".join(element.itertext()).replace("\n", " ").replace(_LINE_BREAK, "\n")
                length = _seconds(element.get("dur", "0s"), units)
                end = (
                    begins[-1] + _seconds(element.get("end", ""), units) if "end" in element.attrib else begin + length
                )
                if "begin" in element.attrib:
                    yield begin, end, said
                elif said.strip():
                    yield math.nan, math.nan, said
                element.clear()
        parser.close()
    except (xml.ParseError, LookupError) as error:
        if not units:
            raise NotTimedText(f"not XML ({error}); expected TTML") from error
        yield None


def _units(root: xml.Element) -> dict[str, float]:
    """Seconds of each unit of an offset; frames and ticks as the file defines them."""

    def parameter(name: str, default: float) -> float:
        text = root.get(_PARAMETER + name, "")
        return float(text) if re.fullmatch("[1-9][0-9]{0,9}", text) else default

    frames = parameter("frameRate", 30.0)
    if found := re.fullmatch("([1-9][0-9]{0,9}) ([1-9][0-9]{0,9})", root.get(_PARAMETER + "frameRateMultiplier", "")):
        frames *= int(found[1]) / int(found[2])
    ticks = parameter("tickRate", frames if _PARAMETER + "frameRate" in root.attrib else 1.0)
    return {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 1e-3, "f": 1 / frames, "t": 1 / ticks}


def _seconds(time: str, units: dict[str, float]) -> float:
    """Seconds, to the millisecond; NaN where it cannot be read."""
    if found := _OFFSET.fullmatch(time.strip()):
        return round(float(found[1]) * units[found[2]], 3)
    if found := _CLOCK.fullmatch(time.strip()):
        seconds = int(found[1] or 0) * 3600 + int(found[2] or 0) * 60 + float(found[3])
        return round(seconds + int(found[4] or 0) * units["f"], 3)
    return math.nan
