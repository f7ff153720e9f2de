"""Subtitles as people have them, and the cues that a reader should find: (start, end, text) in seconds.

`test_subtitles.py` reads them with our reader, `benchmarks/benchmark_parsers.py` with other people's too.
"""

from __future__ import annotations

from typing import NamedTuple

Cues = list[tuple[float, float, str]]


class Case(NamedTuple):
    """Attributes:
    skipped: blocks that have a time, or should have one, and cannot be read.
    """

    about: str
    name: str
    data: bytes
    cues: Cues
    skipped: int = 0


def _vtt(about: str, body: str, cues: Cues, skipped: int = 0, header: str = "WEBVTT\n\n") -> Case:
    return Case(about, "x.vtt", (header + body).encode(), cues, skipped)


def _srt(about: str, body: str, cues: Cues, skipped: int = 0) -> Case:
    return Case(about, "x.srt", body.encode(), cues, skipped)


ONE, TWO = "00:01.000 --> 00:02.000\n", "00:03.000 --> 00:04.000\n"
ONE_SRT, TWO_SRT = "1\n00:00:01,000 --> 00:00:02,000\n", "2\n00:00:03,000 --> 00:00:04,000\n"
BOTH = [(1.0, 2.0, "one"), (3.0, 4.0, "two")]

VTT = (
    _vtt(
        "overlapping cues",
        "00:01.000 --> 00:09.000\none\n\n00:02.000 --> 00:03.000\ntwo\n",
        [(1, 9, "one"), (2, 3, "two")],
    ),
    _vtt("cues out of order", f"{TWO}two\n\n{ONE}one\n", BOTH),
    _vtt("settings", "00:01.000 --> 00:02.000 align:start position:10%,line-left line:0\none\n", [(1, 2, "one")]),
    _vtt("classes, language and styles", f"{ONE}<lang en><c.a.b>o<b>n</b><i>e</i></c></lang>\n", [(1, 2, "one")]),
    _vtt("karaoke times", f"{ONE}on<00:01.500>e<00:00:01.600><c> more</c>\n", [(1, 2, "one more")]),
    _vtt("voices", f"{ONE}<v Roger Bingham>one\n\n{TWO}<v.loud Ann>two</v>\n", BOTH),
    _vtt("a tag over two lines", f"{ONE}<v Roger\nBingham>one</v>\n", [(1, 2, "one")]),
    _vtt("ruby", f"{ONE}<ruby>漢<rt>kan</rt>字<rt>ji</rt></ruby>です\n", [(1, 2, "漢字です")]),
    _vtt("ruby, its last tag left open", f"{ONE}<ruby>漢<rt>kan</ruby>です\n", [(1, 2, "漢です")]),
    _vtt("NOTE before and between", f"NOTE\nof two\nlines\n\n{ONE}one\n\nNOTE about two\n\n{TWO}two\n", BOTH),
    _vtt("STYLE and REGION", f"STYLE\n::cue {{}}\n\nREGION\nid:a\nlines:3\n\n{ONE}one\n\n{TWO}two\n", BOTH),
    _vtt("names of cues", f"intro\n{ONE}one\n\nthe end, 2\n{TWO}two\n", BOTH),
    _vtt(
        "a header with metadata",
        f"{ONE}one\n",
        [(1, 2, "one")],
        header="WEBVTT - Talk\nKind: captions\nLanguage: en\n\n",
    ),
    _vtt("a header that a cue follows at once", f"{ONE}one\n", [(1, 2, "one")], header="WEBVTT\n"),
    _vtt("no header, as in a file whose beginning is cut", f"{ONE}one\n", [(1, 2, "one")], header=""),
    _vtt("a byte order mark", f"{ONE}one\n", [(1, 2, "one")], header="\ufeffWEBVTT\n\n"),
    _vtt("CRLF", f"{ONE}one\n\n{TWO}two\n".replace("\n", "\r\n"), BOTH),
    _vtt("CR", f"{ONE}one\n\n{TWO}two\n".replace("\n", "\r"), BOTH, header="WEBVTT\r\r"),
    Case("UTF-16", "x.vtt", f"WEBVTT\n\n{ONE}one\n\n{TWO}two\n".encode("utf-16"), BOTH),
    _vtt("a cut time", f"{ONE}one\n\n00:03.000 --> 00:0", [(1, 2, "one")], skipped=1),
    _vtt("a cut cue, without its text", f"{ONE}one\n\n{TWO}", [(1, 2, "one")]),
    _vtt("a cut tag", f"{ONE}one\n\n{TWO}two<c.yel", BOTH),
    _vtt("hours", "100:00:01.000 --> 100:00:02.000\none\n", [(360_001, 360_002, "one")]),
    _vtt("a negative time", f"-00:00:01.000 --> 00:00:01.000\nzero\n\n{ONE}one\n", [(1, 2, "one")], skipped=1),
    _vtt("an end before its start", f"00:05.000 --> 00:04.000\nzero\n\n{ONE}one\n", [(1, 2, "one")], skipped=1),
    _vtt("a comma in the times", "00:00:01,000 --> 00:00:02,000\none\n", [(1, 2, "one")]),
    _vtt("no empty line between two cues", f"{ONE}one\n{TWO}two\n", BOTH),
    _vtt("a cue without text between two", f"{ONE}one\n\n00:02.500 --> 00:02.600\n\n{TWO}two\n", BOTH),
    _vtt("entities", f"{ONE}R&amp;D&nbsp;&lt;i&gt; &quot;a&quot; &#39;b&#39;&lrm;\n", [(1, 2, "R&D <i> \"a\" 'b'")]),
    _vtt("signs that are not tags", f"{ONE}I <3 you, 1 < 2 > 0 & so on\n", [(1, 2, "I <3 you, 1 < 2 > 0 & so on")]),
    _vtt("an arrow in the text", f"{ONE}left --> right\n", [(1, 2, "left --> right")]),
    _vtt("a line of spaces in a cue", f"{ONE} \none\n", [(1, 2, "one")]),
    _vtt("a line separator in the text", f"{ONE}one\u2028more\n", [(1, 2, "one more")]),
    _vtt("characters of no width", f"{ONE}\u200bo\xadne\ufeff\n", [(1, 2, "one")]),
    _vtt("a text of two paragraphs", f"{ONE}- one\n- more\n", [(1, 2, "- one - more")]),
    _vtt(
        "rolling captions, as YouTube's",
        "00:00.000 --> 00:02.000 align:start position:0%\n \nthe<00:00:00.500><c> rabbit</c>\n\n"
        "00:02.000 --> 00:02.010 align:start position:0%\nthe rabbit\n \n\n"
        "00:02.010 --> 00:04.000 align:start position:0%\nthe rabbit\nwakes<00:00:02.500><c> up</c>\n\n"
        "00:04.000 --> 00:04.010 align:start position:0%\nwakes up\n \n",
        [(0, 2, "the rabbit"), (2.01, 4, "wakes up")],
    ),
)
SRT = (
    _srt("two cues", f"{ONE_SRT}one\n\n{TWO_SRT}two\n", BOTH),
    _srt("dots in the times", f"{ONE_SRT}one\n\n{TWO_SRT}two\n".replace(",", "."), BOTH),
    _srt("no numbers", f"{ONE_SRT[2:]}one\n\n{TWO_SRT[2:]}two\n", BOTH),
    _srt("no number before the first cue", f"{ONE_SRT[2:]}one\n\n{TWO_SRT}two\n", BOTH),
    _srt("no empty line between two cues", f"{ONE_SRT}one\n{TWO_SRT}two\n", BOTH),
    _srt("three empty lines between two cues", f"{ONE_SRT}one\n\n\n\n{TWO_SRT}two\n", BOTH),
    _srt("lines of spaces between two cues", f"{ONE_SRT}one\n  \n{TWO_SRT}two\n", BOTH),
    _srt("an empty line in a text", f"{ONE_SRT}one\n\nmore\n\n{TWO_SRT}two\n", [(1, 2, "one more"), (3, 4, "two")]),
    _srt("a cue without its times", f"{ONE_SRT}one\n\n2\nlost\n\n3{TWO_SRT[1:]}two\n", BOTH, skipped=1),
    _srt("an empty line after the time", f"{ONE_SRT}\none\n\n{TWO_SRT}two\n", BOTH),
    _srt("an empty line after the number", f"1\n\n{ONE_SRT[2:]}one\n\n{TWO_SRT}two\n", BOTH),
    _srt("a cue without text", f"{ONE_SRT}\n{TWO_SRT}two\n", [(3, 4, "two")]),
    _srt("a text that is a number", f"{ONE_SRT}1984\n\n{TWO_SRT}two\n", [(1, 2, "1984"), (3, 4, "two")]),
    _srt("a last line that is a number", f"{ONE_SRT}in\n1984\n\n{TWO_SRT}two\n", [(1, 2, "in 1984"), (3, 4, "two")]),
    _srt("no hours", "1\n00:01,000 --> 00:02,000\none\n", [(1, 2, "one")]),
    _srt("short numbers", "1\n0:0:1,5 --> 0:0:2,25\none\n", [(1.5, 2.25, "one")]),
    _srt("no fractions", "1\n00:00:01 --> 00:00:02\none\n", [(1, 2, "one")]),
    _srt("spaces in the times", "1\n00:00:01, 000 --> 00: 00:02,000\none\n", [(1, 2, "one")]),
    _srt("no spaces around the arrow", "1\n00:00:01,000-->00:00:02,000\none\n", [(1, 2, "one")]),
    _srt("coordinates", "1\n00:00:01,000 --> 00:00:02,000 X1:40 X2:600 Y1:20 Y2:50\none\n", [(1, 2, "one")]),
    _srt("a negative time", f"0\n-00:00:01,000 --> 00:00:00,500\nzero\n\n{ONE_SRT}one\n", [(1, 2, "one")], skipped=1),
    _srt("styles of HTML", f'{ONE_SRT}<font color="#fff"><B>o</B>n</font>e\n', [(1, 2, "one")]),
    _srt("styles of SubStation", f"{ONE_SRT}{{\\an8}}{{\\i1}}one{{\\i0}}\\Nmore\n", [(1, 2, "one more")]),
    _srt("styles of MicroDVD", f"{ONE_SRT}{{y:i}}one\n", [(1, 2, "one")]),
    _srt("entities", f"{ONE_SRT}R&amp;D &lt;3\n", [(1, 2, "R&D <3")]),
    Case(
        "CRLF, byte order mark", "x.srt", f"\ufeff{ONE_SRT}one\n\n{TWO_SRT}two\n".replace("\n", "\r\n").encode(), BOTH
    ),
    Case(
        "CR CR LF, by a careless converter",
        "x.srt",
        f"{ONE_SRT}one\n\n{TWO_SRT}two\n".replace("\n", "\r\r\n").encode(),
        BOTH,
    ),
    Case("Windows-1252", "x.srt", f"{ONE_SRT}où\n".encode("cp1252"), [(1, 2, "où")]),
    _srt("cut in a time", f"{ONE_SRT}one\n\n2\n00:00:03,000 -", [(1, 2, "one")], skipped=1),
    _srt("cut after a number", f"{ONE_SRT}one\n\n2\n", [(1, 2, "one")]),
    _srt("a header of WebVTT", f"WEBVTT\n\n{ONE_SRT}one\n", [(1, 2, "one")]),
)
CASES = VTT + SRT
