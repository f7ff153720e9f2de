"""Subtitles: what is written is read, in every format; what real files hold besides."""

import html
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emu_jax.data.raw.subtitles import SUFFIXES, Cue, SubtitleError, Subtitles, parse
from tests.data.raw.subtitle_cases import CASES

# ---------------------------------------------------------------- writers, for the property below


def _clock(seconds: float, mark: str) -> str:
    milliseconds = round(seconds * 1000)
    minutes, milliseconds = divmod(milliseconds, 60_000)
    return f"{minutes // 60:02d}:{minutes % 60:02d}:{milliseconds // 1000:02d}{mark}{milliseconds % 1000:03d}"


def _vtt(cues) -> str:
    times = [f"{_clock(cue.start, '.')} --> {_clock(cue.end, '.')} align:start" for cue in cues]
    blocks = [f"{time}\n<v Ann>{html.escape(cue.text)}</v>" for time, cue in zip(times, cues, strict=True)]
    return "\n\n".join(["WEBVTT\nKind: captions", "NOTE said by Ann", *blocks]) + "\n"


def _srt(cues) -> str:
    blocks = [
        f"{number}\r\n{_clock(cue.start, ',')} --> {_clock(cue.end, ',')}\r\n<i>{html.escape(cue.text)}</i>\r\n"
        for number, cue in enumerate(cues, 1)
    ]
    return "\ufeff" + "\r\n".join(blocks)


def _ttml(cues) -> str:
    lines = [
        f'<p begin="{_clock(cue.start, ".")}" end="{_clock(cue.end, ".")}"><span>{html.escape(cue.text[:2])}</span>'
        f"{html.escape(cue.text[2:])}</p>"
        for cue in cues
    ]
    return '<tt xmlns="http://www.w3.org/ns/ttml"><body><div>' + "\n".join(lines) + "</div></body></tt>"


def _json3(cues) -> str:
    milliseconds = [(round(cue.start * 1000), round(cue.end * 1000)) for cue in cues]
    events = [
        {"tStartMs": start, "dDurationMs": end - start, "segs": [{"utf8": cue.text[:2]}, {"utf8": cue.text[2:]}]}
        for (start, end), cue in zip(milliseconds, cues, strict=True)
    ]
    return json.dumps({"wireMagic": "pb3", "events": [{"tStartMs": 0, "id": 1}, *events]})


TEXTS = st.text(st.characters(codec="utf-8", exclude_categories=["C"]), max_size=30).map(lambda s: " ".join(s.split()))
MILLISECONDS = st.integers(0, 100 * 3_600_000)


@st.composite
def _cues(draw):
    starts = sorted(draw(st.lists(MILLISECONDS, max_size=6)))
    cues = [(start, start + draw(st.integers(0, 9000)), draw(TEXTS.filter(bool))) for start in starts]
    return tuple(Cue(start / 1000, end / 1000, text) for start, end, text in cues)


@pytest.mark.parametrize(
    ("name", "write"), [("a.vtt", _vtt), ("a.srt", _srt), ("a.ttml", _ttml), ("a.en.json3", _json3)]
)
@given(cues=_cues())
def test_what_is_written_is_read(name, write, cues):
    assert parse(write(cues).encode(), name) == Subtitles(cues)


@given(data=st.binary(max_size=200), name=st.sampled_from([f"a{suffix}" for suffix in SUFFIXES]))
def test_nothing_else_is_raised(data, name):
    _parse_or_refuse(data, name)


@pytest.mark.parametrize(("name", "write"), [("a.vtt", _vtt), ("a.srt", _srt), ("a.ttml", _ttml), ("a.json3", _json3)])
@given(cues=_cues(), cut=st.integers(0, 400), inserted=st.text("<>/&;:.,-\n\r \t0é-->{}\\rt", max_size=8))
def test_damaged_files_are_read_or_refused(name, write, cues, cut, inserted):
    data = write(cues)
    _parse_or_refuse(data[:cut].encode(), name)
    _parse_or_refuse((data[:cut] + inserted + data[cut:]).encode(), name)


def _parse_or_refuse(data: bytes, name: str) -> None:
    try:
        assert isinstance(parse(data, name), Subtitles)
    except SubtitleError as error:
        assert "\n" not in str(error)


# ---------------------------------------------------------------- real files


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.name[2:]}: {case.about}")
def test_case(case):
    cues = tuple(Cue(float(start), float(end), text) for start, end, text in case.cues)
    assert parse(case.data, case.name) == Subtitles(cues, case.skipped)


def test_vtt():
    text = """WEBVTT - a title
X-TIMESTAMP-MAP=LOCAL:00:00:00.000

STYLE
::cue { color: red }

NOTE
a comment of two lines,
00:01.000 --> 00:02.000

second
01:02.500 --> 01:03.000 position:10%
<v.loud Ann>Salt &amp; pepper,</v>
<c.yellow>please</c> 1 < 2

00:01.000 --> 00:09.000
- <i>over</i>lapping

00:02.000 --> 00:03.000
<b></b>
"""
    cues = (Cue(1.0, 9.0, "- overlapping"), Cue(62.5, 63.0, "Salt & pepper, please 1 < 2"))
    assert parse(text.encode(), "x.vtt") == Subtitles(cues)


def test_srt():
    text = '1\n0:00:01,5 --> 0:00:02,000 X1:0\n{\\an8}<font color="red">Hé</font>\n\n\n'
    text += "2\n00:00:03,000 --> 00:00:04,000\n42\n"
    expected = Subtitles((Cue(1.5, 2.0, "Hé"), Cue(3.0, 4.0, "42")))
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "cp1252"):
        assert parse(text.encode(encoding), "x.SRT") == expected, encoding


def test_json():
    transcript = [{"text": "it&#39;s", "start": 1.5, "duration": 2}, {"text": "late", "start": 0.5, "duration": 0.25}]
    expected = Subtitles((Cue(0.5, 0.75, "late"), Cue(1.5, 3.5, "it's")))
    assert parse(json.dumps(transcript).encode(), "x.json") == expected
    events = {"events": [{"tStartMs": 10, "segs": [{"utf8": "<3\n"}]}, {"tStartMs": 20, "segs": [{"utf8": "\n"}]}]}
    assert parse(json.dumps(events).encode(), "x.json3") == Subtitles((Cue(0.01, 0.01, "<3"),))


def test_malformed_blocks_are_counted():
    vtt = """WEBVTT

00:00:05.000 --> 00:00:04.000
ends before it begins

00:00:0x.000 --> 00:00:04.000
no time

just text

00:00:01.000 --> 00:00:02.000
one
2
00:00:0x.000 --> 00:00:03.000
and another, without an empty line between

00:00:07.000 --> 00:00:08.000
good
"""
    cues = (Cue(1.0, 2.0, "one"), Cue(7.0, 8.0, "good"))
    assert parse(vtt.encode(), "x.vtt") == Subtitles(cues, skipped=4)
    assert parse(vtt.replace(".", ",").encode(), "x.srt") == Subtitles(cues, skipped=4)
    bad = [3, {"tStartMs": "1", "segs": []}, {"segs": [{"utf8": "a"}]}, {"tStartMs": 1, "segs": [{}]}]
    bad += [{"tStartMs": 5, "dDurationMs": -1, "segs": []}]
    assert parse(json.dumps({"events": bad}).encode(), "x.json3") == Subtitles((), skipped=5)
    bad = [None, {"text": "a"}, {"text": 1, "start": 1, "duration": 1}, {"text": "a", "start": "NaN", "duration": 1}]
    assert parse(json.dumps(bad).encode(), "x.json") == Subtitles((), skipped=4)


@pytest.mark.parametrize("repeated", ["\r", "\n", " ", "<rt>", "</a", "0:-->"])
def test_a_long_file_of_one_thing(repeated):
    """Reading takes time in proportion to the length, otherwise minutes here."""
    parse(f"WEBVTT\n\n00:01.000 --> 00:02.000\n{repeated * 200_000}".encode(), "x.vtt")


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("x.txt", b""),
        ("x.ttml", b""),
        ("x.ttml", b"<html/>"),
        ("x.json3", b"{"),
        ("x.json", b"3"),
        ("x.json", b"{}"),
        ("x.json", b"[" * 9999),
    ],
)
def test_no_subtitles(name, data):
    with pytest.raises(SubtitleError):
        parse(data, name)


def test_other_alphabets_than_the_western_ones_need_utf8():
    """They would be read as accented letters, without a word."""
    for text, encoding in (
        ("Привет, мир", "cp1251"),
        ("你好，世界", "gb18030"),
        ("こんにちは", "shift-jis"),
        ("γειά", "cp1253"),
    ):
        data = f"1\n00:00:01,000 --> 00:00:02,000\n{text}\n"
        assert parse(data.encode(), "x.srt").cues == (Cue(1.0, 2.0, text),)
        with pytest.raises(SubtitleError, match=r"^neither UTF-8 nor Windows-1252; convert it to UTF-8$"):
            parse(data.encode(encoding), "x.srt")


def test_ttml():
    text = """<?xml version="1.0" encoding="utf-8"?>
<tt xmlns="http://www.w3.org/ns/ttml" xmlns:ttp="http://www.w3.org/ns/ttml#parameter" ttp:frameRate="24"
    xmlns:tts="http://www.w3.org/ns/ttml#styling" ttp:frameRateMultiplier="1000 1001" ttp:tickRate="10000000">
<head><metadata><title>Talk</title></metadata></head>
<body begin="1s"><div>
<p begin="00:00:01.500" end="00:00:02.500">It is<br/><span tts:color="red">raining</span>
 &amp; cold.</p>
<p begin="00:00:00:23" dur="2s">First.</p>
<p begin="25000000t" end="24f"><span tts:ruby="base">雨</span><span tts:ruby="text">ame</span></p>
<p begin="1:30" end="1.5m"/>
<p begin="soon">Not read.</p>
<p>Nor this.</p>
</div></body></tt>"""
    first, second = Cue(1.959, 3.959, "First."), Cue(2.5, 3.5, "It is raining & cold.")
    found = parse(text.encode(), "x.ttml")
    assert found == Subtitles((first, second), skipped=3)  # the third ends before it begins
    assert parse(text.replace('"24f"', '"100f"').encode(), "x.ttml").cues[2] == Cue(3.5, 5.171, "雨")
    assert parse(text[: text.index("First")].encode(), "x.ttml") == Subtitles((second,), skipped=1)
    old = text.replace("http://www.w3.org/ns/ttml", "http://www.w3.org/2006/10/ttaf1").replace("utf-8", "utf-16")
    assert parse(old.encode("utf-16"), "x.ttml").cues[1] == second


# ---------------------------------------------------------------- rolling captions

ROLLING = """WEBVTT
Kind: captions
Language: en

00:00:00.000 --> 00:00:02.000 align:start position:0%
 
the<00:00:00.500><c> rabbit</c><00:00:01.000><c> wakes</c>

00:00:02.000 --> 00:00:02.010 align:start position:0%
the rabbit wakes
 

00:00:02.010 --> 00:00:04.000 align:start position:0%
the rabbit wakes
up<00:00:02.500><c> and</c><00:00:03.000><c> yawns</c>

00:00:04.000 --> 00:00:04.010 align:start position:0%
up and yawns
 

00:00:04.010 --> 00:00:06.000 align:start position:0%
up and yawns
up and yawns
"""


def test_rolling_captions_say_each_line_once():
    cues = (Cue(0.0, 2.0, "the rabbit wakes"), Cue(2.01, 4.0, "up and yawns"), Cue(4.01, 6.0, "up and yawns"))
    assert parse(ROLLING.encode(), "x.vtt") == Subtitles(cues)
    plain = "\n\n".join(block for block in ROLLING.split("\n\n")[1:])  # as SRT, by a converter
    assert parse(plain.encode(), "x.srt") == Subtitles(cues)


def test_what_is_said_twice_stays():
    cues = tuple(Cue(float(second), second + 1.0, text) for second, text in enumerate(["No!", "No!", "No!", "Yes."]))
    assert parse(_vtt(cues).encode(), "x.vtt") == Subtitles(cues)
