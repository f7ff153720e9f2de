"""Clips and captions: both kinds of table, shards, keys, rejects, and the words that are stripped."""

import csv
import io
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as PIL

from emu_jax.data.document import Text
from emu_jax.data.frames import frame_indices
from emu_jax.data.raw.reader import RawDocument, Reject
from emu_jax.data.raw.readers.videos import Videos, strip_metadata, table_rows
from emu_jax.errors import UserError
from tests.videos import grey_animation, grey_video

ALL = [*range(16)]  # frames of a short video
WEBVID = "videoid,contentUrl,duration,page_dir,name\n"


def _read(reader: Videos, path) -> list[RawDocument | Reject]:
    return [item for shard in reader.shards(str(path)) for item in reader.read(shard)]


def _brief(item: RawDocument | Reject) -> tuple:
    """A document as (key, its frames' numbers, text), a reject as (key, reason)."""
    if isinstance(item, Reject):
        assert item.detail and "\n" not in item.detail and item.whole
        return item.key, item.reason
    *images, text = item.parts
    assert item.kind == "video" and isinstance(text, Text) and text.role == ""
    assert all(image.data.dtype == np.uint8 and image.data.ndim == 3 and image.score is None for image in images)
    return item.key, [round((float(image.data.mean()) - 40) / 8) for image in images], text.text


# ---------------------------------------------------------------- the two tables


def test_webvid(tmp_path):
    grey_video(tmp_path / "027701_027750" / "1053.mp4")
    grey_video(tmp_path / "1054.mp4")
    (tmp_path / "results.csv").write_text(
        WEBVID
        + '1053,https://x/1053.mp4,PT00H00M02S,027701_027750,"A bee, 4k\n on a flower"\n'
        + "1054,,PT00H00M02S,000001_000050,Cat climbing on tree\n"
        + "1055,,PT00H00M02S,000001_000050,Not there\n"
        + "1054,,PT00H00M02S,000001_000050,HD 1080p\n",
        encoding="utf-8-sig",
    )
    assert [_brief(item) for item in _read(Videos(), tmp_path)] == [
        ("results.csv/00000000", ALL, "A bee, on a flower"),
        ("results.csv/00000001", ALL, "Cat climbing on tree"),
        ("results.csv/00000002", "missing_video"),
        ("results.csv/00000003", "no_text"),
    ]
    assert _brief(_read(Videos(strip=False), tmp_path)[3])[2] == "HD 1080p"


def test_file_and_text(tmp_path):
    grey_animation(tmp_path / "videos" / "one" / "a.webp")
    grey_video(tmp_path / "videos" / "b.mp4", 1)
    table = tmp_path / "table.csv"
    table.write_text("text,file,more\na 4k sign,one/a.webp,\n  a  b ,b.mp4,x\n")
    assert [_brief(item) for item in _read(Videos(folder=str(tmp_path / "videos")), table)] == [
        ("table.csv/00000000", ALL, "a 4k sign"),  # the user's own words stay
        ("table.csv/00000001", [0], "a b"),
    ]
    three = _read(Videos(folder=str(tmp_path / "videos"), frames=3), table)
    assert _brief(three[0])[1] == [2, 7, 12]  # g = 5


def test_frames_that_are_stored(tmp_path):
    """24 of more, spread by the reference's rule; with `frames=8` the reference's own."""
    grey_video(tmp_path / "a.mp4", 27)
    (tmp_path / "t.csv").write_text("file,text\na.mp4,a\n")
    stored, eight = (_brief(_read(reader, tmp_path)[0])[1] for reader in (Videos(), Videos(frames=8)))
    assert stored == frame_indices(27, 24) and len(set(stored)) == 24
    assert eight == frame_indices(27) == [1, 4, 7, 11, 14, 17, 21, 24]


def test_rejects(tmp_path):
    grey_video(tmp_path / "good.mp4")
    data = (tmp_path / "good.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.mp4").write_bytes(b"no video")
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "table.csv").write_bytes(
        b"file,text\ncut.mp4,a\ntext.mp4,a\nempty.mp4,a\n\ngone.mp4,a\n/etc/hosts,a\nx/../../good.mp4,a\n.,a\n"
        b"good.mp4,caf\xe9\ngood.mp4, \nonly one\na,b,c\ngood.mp4,caf\xc3\xa9\ngood.mp4"
    )
    got = [_brief(item) for item in _read(Videos(), tmp_path)]
    assert [key for key, *_ in got] == [f"table.csv/{number:08d}" for number in range(13)]
    assert [reason for _, reason, *_ in got] == [
        "cut_video",
        "unreadable_video",
        "unreadable_video",
        "missing_video",
        "missing_video",
        "missing_video",
        "missing_video",
        "unreadable_text",
        "no_text",
        "unreadable_row",
        "unreadable_row",
        ALL,
        "unreadable_row",
    ]


def test_an_open_quote_costs_its_line_alone(tmp_path):
    """Closed by the end of the file, or by a quote in another row's text; the rows after it are not its caption."""
    for last in (b"d.mp4,a bird\n", b'd.mp4,"a bird"\n', b'"d.mp4","a\nbird"\n'):
        (tmp_path / "t.csv").write_bytes(b'file,text\na.mp4,a fish\nb.mp4,"a cat\nc.mp4,a dog\n' + last)
        for shard_rows in (1, 100):
            got = [_brief(item) for item in _read(Videos(shard_rows=shard_rows), tmp_path)]
            reasons = ["missing_video", "unreadable_row", "missing_video", "missing_video"]
            assert got == [(f"t.csv/{n:08d}", reason) for n, reason in enumerate(reasons)]


def test_a_quote_that_never_closes(tmp_path):
    lines = "".join(f"{number}.mp4,{'word ' * 20}\n" for number in range(3000))
    (tmp_path / "table.csv").write_text('file,text\na.mp4,"' + lines)
    got = [_brief(item) for item in _read(Videos(shard_rows=100), tmp_path)]
    assert got[0] == ("table.csv/00000000", "unreadable_row")
    assert [key for key, _ in got] == [f"table.csv/{number:08d}" for number in range(len(got))]
    assert got[-1][1] == "missing_video"  # the rows behind it are read again


def test_wrong_paths(tmp_path):
    for path, expected in [
        (tmp_path, "no CSV of videos here"),
        (tmp_path / "gone.csv", "no CSV of videos here"),
    ]:
        with pytest.raises(UserError, match=expected):
            Videos().shards(str(path))
    table = tmp_path / "a.csv"
    for text, expected in [
        ("", "expected a header with the columns file and text"),
        ("url,caption\n", "'url,caption'; expected a header"),
        ("file,text\n\n", "no rows below the header"),
    ]:
        table.write_text(text)
        with pytest.raises(UserError, match=expected):
            Videos().shards(str(table))
    with pytest.raises(UserError, match="no such folder"):
        Videos(folder=str(tmp_path / "gone")).shards(str(table))
    with pytest.raises(UserError, match="frames=0; expected at least 1"):
        Videos(frames=0)


# ---------------------------------------------------------------- shards

CELLS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=12)


@given(rows=st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=12), shard_rows=st.integers(1, 5))
def test_shards_hold_every_row_once(tmp_path_factory, rows, shard_rows):
    table = tmp_path_factory.mktemp("table") / "t.csv"
    with table.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("file", "text"), *rows])
    reader = pickle.loads(pickle.dumps(Videos(shard_rows=shard_rows)))
    shards = reader.shards(str(table))
    assert len(shards) == -(-len(rows) // shard_rows)
    got = [item for shard in reversed(shards) for item in reader.read(shard)]
    assert sorted(item.key for item in got) == [f"t.csv/{number:08d}" for number in range(len(rows))]
    whole = list(Videos().read(Videos().shards(str(table))[0]))
    assert sorted(got, key=lambda item: item.key) == whole


@given(rows=st.lists(st.tuples(st.text('a",\n\r é', max_size=6), st.text('b",\n ', max_size=6)), max_size=8))
def test_rows_are_what_was_written(rows):
    """Of any cells, quoted where they must be: what Python's own writer wrote."""
    text = io.StringIO(newline="")
    csv.writer(text, quoting=csv.QUOTE_ALL).writerows(rows)
    assert list(table_rows(io.BytesIO(text.getvalue().encode("utf-8-sig")))) == [list(row) for row in rows]


def test_folders_of_tables_and_tables_that_shrank(tmp_path):
    for name in ("b.csv", "a.csv"):
        (tmp_path / name).write_text("file,text\nx.mp4,a\ny.mp4,b\nz.mp4,c\n")
    reader = Videos(shard_rows=2)
    shards = reader.shards(str(tmp_path))
    assert [shard.removeprefix(str(tmp_path)) for shard in shards] == [
        "/a.csv@10:0+2",
        "/a.csv@26:2+1",
        "/b.csv@10:0+2",
        "/b.csv@26:2+1",
    ]
    (tmp_path / "a.csv").write_text("file,text\nx.mp4,a\n")
    got = list(reader.read(shards[0]))
    assert [(item.key.rpartition("/")[2], item.reason) for item in got] == [
        ("00000000", "missing_video"),
        ("a.csv@10:0+2", "cut_shard"),
    ]


# ---------------------------------------------------------------- captions


@pytest.mark.parametrize(
    ("before", "after"),
    [
        # The first five are WebVid's own.
        (
            "Laundry outline icon animation footage/video. hand drawn like symbol animated with motion graphic, "
            "can be used as loop item, has alpha channel and it's at 4k video resolution.",
            "Laundry outline icon animation. hand drawn like symbol animated with motion graphic.",
        ),
        (
            "Saint petersburg, russia - april 15, 2014: city view of embankment in sunny day",
            "Saint petersburg, russia: city view of embankment in sunny day",
        ),
        ("Aerial uhd 4k view. mid-air flight over a river.", "Aerial view. mid-air flight over a river."),
        ("Video 1920x1080 - coconut palm tree shadow , thailand", "Video - coconut palm tree shadow, thailand"),
        ("Kiev, ukraine 30.07.2015. cars go on the road.", "Kiev, ukraine. cars go on the road."),
        ("Stock footage of a cat, 4K, 60 fps", "a cat"),
        ("Clip 12345: waves on a beach (full HD)", "waves on a beach"),
        ("Shot on RED Epic. a man walks on the red carpet", "a man walks on the red carpet"),
        ("Close up of a bee in 4K UHD resolution", "Close up of a bee"),
        ("City at night - circa 2014", "City at night"),
        ("Fire burning with alpha channel. Prores 4444.", "Fire burning."),
        ("Seamless loop of falling snow, 29.97fps", "falling snow"),
        ("HD. London, uk - 12 may 2016: a bridge. editorial use only", "London, uk: a bridge."),
        ("Aerial 3840x2160 shot of sea, filmed with dji mavic 2 pro.", "Aerial shot of sea."),
        ("Video of a dog, 4k, 24 fps: it barks", "Video of a dog: it barks"),
        ("4k", ""),
    ],
)
def test_metadata_goes(before, after):
    assert strip_metadata(before) == after


@pytest.mark.parametrize(
    "caption",
    [
        "Time lapse video of light cirrus clouds in a sky darkened by the eclipse",
        "Woman runs a 5k race in slow motion",
        "Model shot on red carpet",
        "Two dogs , 101 dalmatians and 2000 balloons",  # even its spaces
        "Horse grazing - seperated on green screen",
        "People march in may, flags in hand",
        "Close-up of a clip on a loop of rope... part 2",
    ],
)
def test_what_is_seen_stays(caption):
    assert strip_metadata(caption) == caption


@given(caption=st.text(st.sampled_from("4khd .,:-()20156 may fps"), max_size=60))
def test_stripping_is_fast_and_leaves_one_line(caption):
    got = strip_metadata(caption)
    assert "\n" not in got and len(got) <= len(caption)


def test_frames_are_the_video_s_own_size(tmp_path):
    buffer = io.BytesIO()
    PIL.new("RGB", (3, 2)).save(buffer, "GIF")
    (tmp_path / "a.gif").write_bytes(buffer.getvalue())
    (tmp_path / "t.csv").write_text("file,text\na.gif,a dot\n")
    (item,) = _read(Videos(), tmp_path)
    assert [image.data.shape for image in item.parts[:-1]] == [(2, 3, 3)]
