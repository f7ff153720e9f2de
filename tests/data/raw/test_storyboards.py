"""Storyboards: the order of frames and texts, both layouts, and what is left out."""

import io
import itertools
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as PIL

from emu_jax.data.document import Text
from emu_jax.data.raw.files import Skip
from emu_jax.data.raw.languages import choose_subtitles
from emu_jax.data.raw.reader import RawDocument, RawImage, Reject
from emu_jax.data.raw.readers.storyboards import Storyboards, interleave
from emu_jax.data.raw.subtitles import Cue
from emu_jax.errors import UserError

VTT = """WEBVTT

00:00.500 --> 00:01.000
It begins

00:01.000 --> 00:02.000
to rain.

00:02.000 --> 00:04.000
The end
"""


def _image(kind: str, grey: int, size=(8, 6)) -> bytes:
    buffer = io.BytesIO()
    PIL.new("RGB", size, (grey,) * 3).save(buffer, kind)
    return buffer.getvalue()


def _video(folder: Path, frames: int = 2, **files: str | None) -> Path:
    """A folder of frames, subtitles.vtt and info.json; a file given as None is left out."""
    folder.mkdir(parents=True)
    for number in range(frames):
        (folder / f"frame_{number}.jpg").write_bytes(_image("JPEG", number))
    texts = {"subtitles_vtt": VTT, "info_json": '{"duration": 4}', **files}
    for name, text in texts.items():
        if text is not None:
            (folder / name.replace("_", ".")).write_text(text)
    return folder


def _read(reader: Storyboards, path) -> list[RawDocument | Reject]:
    return [item for shard in reader.shards(str(path)) for item in reader.read(shard)]


def _said(item: RawDocument) -> list:
    """Texts as they are, frames as their numbers (their grey)."""
    assert isinstance(item, RawDocument) and item.kind == "storyboard", item
    greys = []
    for part in item.parts:
        if isinstance(part, Text):
            greys.append(part.text)
        else:
            raw = isinstance(part.data, bytes)
            pixels = np.asarray(PIL.open(io.BytesIO(part.data)).convert("RGB")) if raw else part.data
            greys.append(round(float(pixels.mean())))
    return greys


# ---------------------------------------------------------------- the order


@pytest.mark.parametrize(
    ("cues", "expected"),
    [
        # Frames stand at 0, 2 and 4 s.
        ([], ["p", "q", "r"]),
        ([(1, "a")], ["p", "a", "q", "r"]),
        ([(0, "a"), (1, "b"), (1.9, "c")], ["p", "a b c", "q", "r"]),  # a frame stands first at an equal time
        ([(2, "a"), (4, "b")], ["p", "q", "a", "r", "b"]),
        ([(-1, "a"), (9, "b"), (10, "c")], ["a", "p", "q", "r", "b c"]),  # trailing text is kept
        ([(3, "b"), (1, "a"), (3, "c")], ["p", "a", "q", "b c", "r"]),
    ],
)
def test_a_frame_follows_what_is_said_up_to_it(cues, expected):
    frames = [RawImage(name.encode()) for name in "pqr"]
    got = interleave(frames, 2.0, [Cue(start, start + 1, text) for start, text in cues])
    assert [part.text if isinstance(part, Text) else part.data.decode() for part in got] == expected


@given(
    frames=st.integers(0, 6),
    interval=st.sampled_from([0.5, 1.0, 2.0]),
    starts=st.lists(st.integers(0, 24).map(lambda n: n / 4), max_size=8),
)
def test_nothing_is_lost_and_texts_are_merged(frames, interval, starts):
    cues = [Cue(start, start, f"{start}") for start in sorted(starts)]
    got = interleave([RawImage(bytes([n])) for n in range(frames)], interval, cues)
    assert [part.data[0] for part in got if isinstance(part, RawImage)] == list(range(frames))
    assert " ".join(part.text for part in got if isinstance(part, Text)).split() == [cue.text for cue in cues]
    now, seen = -1.0, 0
    for part, after in zip(got, (*got[1:], None), strict=False):
        if isinstance(part, RawImage):
            seen, now = seen + 1, part.data[0] * interval
        else:
            assert not isinstance(after, Text)
            assert all(float(start) >= now for start in part.text.split())
            assert seen == frames or all(float(start) < seen * interval for start in part.text.split())


# ---------------------------------------------------------------- a folder a video


def test_folders(tmp_path):
    for frames, name in [(2, "b"), (1, "a")]:
        _video(tmp_path / name, frames)
    first, second = _read(pickle.loads(pickle.dumps(Storyboards())), tmp_path)
    assert (first.key, _said(first)) == ("a", [0, "It begins to rain. The end"])
    assert (second.key, _said(second)) == ("b", [0, "It begins to rain.", 1, "The end"])  # 1 stands at 4 s / 2
    assert second.parts[0] == RawImage((tmp_path / "b" / "frame_0.jpg").read_bytes())  # as it was found
    assert _read(Storyboards(), tmp_path / "b") == [second]


def test_frames_in_the_order_of_their_numbers(tmp_path):
    _video(tmp_path / "v", 12, subtitles_vtt=None, talk_srt="1\n00:00:03,900 --> 00:00:04,000\nlast\n")
    (got,) = _read(Storyboards(), tmp_path)
    assert _said(got) == [*range(12), "last"]


def test_rejects_of_folders(tmp_path):
    _video(tmp_path / "a", 0)
    _video(tmp_path / "b", subtitles_vtt=None)
    _video(tmp_path / "c", subtitles_vtt="WEBVTT\n")
    _video(tmp_path / "d", subtitles_vtt=None, subtitles_json3="{")
    _video(tmp_path / "e", info_json=None)
    _video(tmp_path / "f", info_json='{"duration": "4"}')
    _video(tmp_path / "g", info_json='{"duration": 0}')
    _video(tmp_path / "h", info_json="no")
    _video(tmp_path / "i", info_json="[3]")
    _video(tmp_path / "j", subtitles_vtt=VTT + "\nnot a cue\n")
    got = _read(Storyboards(), tmp_path)
    assert [(item.key, item.reason, item.whole) for item in got if isinstance(item, Reject)] == [
        ("a", "no_image", True),
        ("b", "no_subtitles", True),
        ("c", "no_subtitles", True),
        ("d", "unreadable_subtitles", True),
        ("e", "no_duration", True),
        ("f", "no_duration", True),
        ("g", "no_duration", True),
        ("h", "unreadable_json", True),
        ("i", "unreadable_json", True),
        ("j#subtitles", "malformed_cue", False),
    ]
    assert _said(got[-1]) == [0, "It begins to rain.", 1, "The end"]
    assert all(item.detail and "\n" not in item.detail for item in got[:-1])


def test_subtitles_in_the_language_of_the_setting(tmp_path):
    says = {name: VTT.replace("It begins", name) for name in ("x_de_vtt", "x_en_vtt", "x_en-GB_vtt", "x_vtt")}
    folder = _video(tmp_path / "v", 1, subtitles_vtt=None, **says)

    def read(language: str) -> tuple[str, list[str]]:
        *rejects, found = _read(Storyboards(language=language), folder)
        assert all((r.reason, r.whole) == ("other_subtitles", False) for r in rejects)
        return _said(found)[1].split()[0], [r.key for r in rejects]

    others = ["v#x.de.vtt", "v#x.en-GB.vtt", "v#x.vtt"]
    assert read("en") == ("x_en_vtt", others)
    assert [read(language)[0] for language in ("de", "deu", "en_GB", "en-US", "fr", "")] == [
        "x_de_vtt",
        "x_de_vtt",
        "x_en-GB_vtt",
        "x_en_vtt",  # no exact one: the one without a region
        "x_vtt",
        "x_de_vtt",
    ]
    for name in ("x.en.vtt", "x.en-GB.vtt", "x.vtt"):
        (folder / name).unlink()
    (reject,) = _read(Storyboards(), folder)
    assert (reject.reason, reject.whole) == ("no_subtitles", True)
    assert reject.detail == "subtitles in de only, none in en; set language to read them"


@pytest.mark.parametrize(
    ("language", "names", "chosen"),
    [
        ("en", "x.a.en.vtt x.en.vtt x.en-orig.vtt", "x.en.vtt"),  # people's before a program's
        ("en", "x.en-orig.vtt x.en-US.vtt x.vtt", "x.en-US.vtt"),
        ("en", "x.de.vtt x.en-orig.vtt x.vtt", "x.en-orig.vtt"),
        ("en-US", "x.en-GB.vtt x.en_us.vtt x.en.vtt", "x.en_us.vtt"),
        ("en", "x.en.forced.srt x.en.sdh.srt", "x.en.sdh.srt"),
        ("en", "x.en.hi.srt x.vtt", "x.en.hi.srt"),  # for the hard of hearing
        ("hi", "x.en.hi.srt x.hi.srt", "x.hi.srt"),
        ("he", "x.en.vtt x.iw.vtt", "x.iw.vtt"),
        ("pt", "x.por.vtt x.vtt", "x.por.vtt"),
        ("en", "x.en.srt x.en.ttml x.en.vtt", "x.en.vtt"),
        ("en", "x.en.json3 x.en.vtt", "x.en.json3"),
        ("en", "x.sv.forced.srt x.swe.srt x.fil.vtt", None),
    ],
)
def test_languages_in_names(language, names, chosen):
    if chosen:
        for ordered in itertools.permutations(names.split()):
            assert choose_subtitles(ordered, language) == chosen
        return
    with pytest.raises(Skip) as skip:
        choose_subtitles(names.split(), language)
    assert skip.value.detail == "subtitles in fil, sv only, none in en; set language to read them"


def test_wrong_paths(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        Storyboards().shards(str(tmp_path / "gone"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("")
    with pytest.raises(UserError, match="no storyboards here; expected"):
        Storyboards().shards(str(tmp_path))


# ---------------------------------------------------------------- the reference's sheets


def _sheet(columns: int, rows: int, first: int) -> bytes:
    """Cells of 8 x 6 pixels, row by row, of grey `first`, `first` + 1, …"""
    sheet = PIL.new("RGB", (8 * columns, 6 * rows))
    for cell in range(columns * rows):
        sheet.paste((first + cell,) * 3, (8 * (cell % columns), 6 * (cell // columns), *[10**4] * 2))
    buffer = io.BytesIO()
    sheet.save(buffer, "WEBP", lossless=True)
    return buffer.getvalue()


def _board(root: Path, key: str, **changes) -> None:
    """Two sheets of 3 x 2 and 2 x 2 cells, 6 + 3 of them frames, of a video of 18.4 s: an interval of 2 s."""
    for folder in ("00000", "subtitle", "label"):
        (root / folder).mkdir(exist_ok=True)
    labels = {"0": [24, 12, 3, 2, 6, "webp"], "1": [16, 12, 2, 2, 3, "webp"]}
    content = {"url": f"https://www.youtube.com/watch?v=id-{key}", "yt_meta_dict": {"info": None, "sb": labels}}
    (root / "00000" / f"{key}.json").write_text(json.dumps({**content, **changes}))
    (root / "00000" / f"{key}_0.webp").write_bytes(_sheet(3, 2, 0))
    (root / "00000" / f"{key}_1.webp").write_bytes(_sheet(2, 2, 6))
    said = [(0.1, "a"), (3.0, "b"), (3.9, "c"), (4.0, "d"), (17.0, "e"), (18.0, "f")]
    transcript = [{"text": text, "start": start, "duration": 1.0} for start, text in said]
    (root / "subtitle" / f"id-{key}.json").write_text(json.dumps(transcript))
    (root / "label" / f"id-{key}.json").write_text('{"duration": 18.4}')


def test_sheets(tmp_path):
    for key in ("000000002", "000000001"):
        _board(tmp_path, key)
    got = _read(Storyboards(), tmp_path)
    assert [item.key for item in got] == ["00000/000000001", "00000/000000002"]
    assert _said(got[0]) == [0, "a", 1, "b c", 2, "d", 3, 4, 5, 6, 7, 8, "e f"]
    assert all(part.data.shape == (6, 8, 3) for part in got[0].parts if isinstance(part, RawImage))
    assert len(list(Storyboards().read(str(tmp_path / "00000")))) == 2


def test_languages_of_sheets(tmp_path):
    """The other subtitles of a video are counted as in a folder of its own."""
    for key in "ab":
        _board(tmp_path, key)
    said = tmp_path / "subtitle"
    for name in ("id-a.de.vtt", "id-a.en-GB.srt", "id-a.info.json", "id-a.txt", "id-other.en.vtt", "id-a.a.en.vtt"):
        (said / name).write_text(VTT)
    (said / "id-a.json").unlink()
    (said / "id-b.json").rename(said / "id-b.de.json")
    got = _read(Storyboards(), tmp_path)
    assert [(item.key, item.reason, item.whole) for item in got if isinstance(item, Reject)] == [
        ("00000/a#id-a.a.en.vtt", "other_subtitles", False),
        ("00000/a#id-a.de.vtt", "other_subtitles", False),
        ("00000/b", "no_subtitles", True),
    ]
    assert _said(got[2])[:3] == [0, "It begins to rain.", 1]
    assert [type(item) for item in _read(Storyboards(language="de"), tmp_path)][-1] is RawDocument


def test_sheets_with_folders_of_other_names(tmp_path):
    _board(tmp_path, "1", yt_meta_dict={"info": {"duration": 9}, "sb": {"0": [24, 12, 3, 2, 6, "webp"]}})
    (tmp_path / "00000" / "1_1.webp").unlink()
    (tmp_path / "subtitle").rename(tmp_path / "said")
    (tmp_path / "label").rename(tmp_path / "told")
    reader = Storyboards(subtitles=str(tmp_path / "said"), labels=str(tmp_path / "told"))
    # 18.4 s / 6 frames: 3.07, rounded to 3; without the label 9 s / 6 = 1.5, rounded to 2.
    assert _said(_read(reader, tmp_path)[0]) == [0, "a", 1, "b c d", 2, 3, 4, 5, "e f"]
    reader = Storyboards(subtitles=str(tmp_path / "said"))
    assert _said(_read(reader, tmp_path)[0]) == [0, "a", 1, "b c", 2, "d", 3, 4, 5, "e f"]
    (tmp_path / "told" / "id-1.json").write_text('{"duration": 2.4}')  # 0.4 s would be rounded to 0
    reader = Storyboards(subtitles=str(tmp_path / "said"), labels=str(tmp_path / "told"))
    assert _said(_read(reader, tmp_path)[0]) == [0, "a", 1, 2, 3, 4, 5, "b c d e f"]


def test_rejects_of_sheets(tmp_path):
    changes = {
        "a": {"yt_meta_dict": None},
        "b": {"url": "../../secret"},
        "c": {"yt_meta_dict": {"sb": {"0": [24, 12, 3, 2, 6, "webp"]}}},  # of two sheets
        "d": {"yt_meta_dict": {"sb": {"0": [24, 12, 0, 2, 6, "webp"]}}},
        "e": {"yt_meta_dict": {"sb": {"0": [24, 12, 5, 2, 6, "webp"]}}},  # 24 pixels in 5 columns
    }
    for key in "abcdefghij":
        _board(tmp_path, key, **changes.get(key, {}))
    (tmp_path / "00000" / "f.json").write_text('{"url": ')
    (tmp_path / "00000" / "g_1.webp").write_bytes(_sheet(2, 2, 6)[:40])
    (tmp_path / "subtitle" / "id-h.json").unlink()
    (tmp_path / "label" / "id-i.json").unlink()
    got = _read(Storyboards(), tmp_path)
    assert [(item.key, item.reason) for item in got[:-1]] == [
        ("00000/a", "unreadable_json"),
        ("00000/b", "unreadable_json"),
        ("00000/c", "unreadable_json"),
        ("00000/d", "unreadable_json"),
        ("00000/e", "unreadable_image"),
        ("00000/f", "unreadable_json"),
        ("00000/g", "unreadable_image"),
        ("00000/h", "no_subtitles"),
        ("00000/i", "no_duration"),
    ]
    assert got[-1].key == "00000/j" and len(_said(got[-1])) == 13
    assert all(item.detail and "\n" not in item.detail and item.whole for item in got[:-1])
