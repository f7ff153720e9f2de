"""Raw data of the mixture: from small archives of the same form, read back by the readers that are to read them."""

import csv
import io
import json
import re
import tarfile
import zipfile
from pathlib import Path

import av
import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as PIL

from emu_jax.data.document import Text
from emu_jax.data.raw.readers.html import Html
from emu_jax.data.raw.readers.pairs import ImageText
from emu_jax.data.raw.readers.storyboards import Storyboards
from emu_jax.data.raw.readers.videos import Videos
from emu_jax.data.raw.subtitles import Cue, parse
from emu_jax.errors import UserError
from launch.mixture_data import (
    ANIMATIONS,
    IMAGES,
    NAMES,
    NARRATION,
    VIDEO,
    VIDEO_FOLDER,
    cut_track,
    stills,
    write_all,
)

EMOJI = {"1f408": "cat", "1f415": "dog", "1f44b-1f3ff": "waving hand: dark skin tone", "1f99c": "parrot"}


def _tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def _webp(colours: list[str]) -> bytes:
    frames = [PIL.new("RGBA", (300, 300), colour) for colour in colours]
    stream = io.BytesIO()
    more = {"save_all": True, "append_images": frames[1:]} if frames[1:] else {}
    frames[0].save(stream, "WEBP", lossless=True, **more)
    return stream.getvalue()


def _video(seconds: float) -> bytes:
    """4 frames a second; the grey of a frame is five times its second."""
    stream = io.BytesIO()
    with av.open(stream, "w", format="mp4") as container:
        video = container.add_stream("mpeg4", rate=4)
        video.width, video.height, video.pix_fmt = 32, 16, "yuv420p"
        for number in range(round(4 * seconds)):
            pixels = np.full((16, 32, 3), 5 * number / 4, np.uint8)
            container.mux(video.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(video.encode())
    return stream.getvalue()


@pytest.fixture(scope="module")
def download(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("download")
    dark = {"hexcode": "1F44B-1F3FF", "label": "waving hand: dark skin tone"}
    wave = {"hexcode": "1F44B-FE0F", "label": "waving hand", "skins": [dark]}
    items = [*({"hexcode": code.upper(), "label": EMOJI[code]} for code in ("1f408", "1f415", "1f99c")), wave]
    _tar(folder / NAMES, {"package/en/data.json": json.dumps(items).encode()})
    still = {f"package/assets/{code}.webp": _webp(["red"]) for code in [*EMOJI, "1f600"]}  # the last has no name
    _tar(folder / IMAGES, still | {"package/package.json": b"{}"})
    moving = {"package/assets/1f408.webp": _webp(["red", "blue"]), "package/assets/1f415.webp": _webp(["red"])}
    _tar(folder / ANIMATIONS, moving | {"package/assets/1f44b-1f3ff.webp": _webp(["red", "lime", "blue"])})
    videos = io.BytesIO()
    with zipfile.ZipFile(videos, "w") as archive:
        archive.writestr("moviepy_10_minutes/resources/bbb.mp4", _video(44))
    _tar(folder / VIDEO, {VIDEO_FOLDER: videos.getvalue()})
    for page, image in (
        ("gimp-help-en/usr/share/gimp/3.0/help/en/a.html", "images/cat.png"),
        ("python-sklearn-doc/usr/share/doc/python-sklearn-doc/html/modules/a.html", "../_images/cat.png"),
    ):
        path = folder / page
        path.parent.mkdir(parents=True)
        path.write_text(f"<p>A cat:<img src={image}>asleep.")
        (path.parent / image).parent.mkdir()
        PIL.new("RGB", (64, 64), "red").save(path.parent / image)
    html = folder / "python-sklearn-doc/usr/share/doc/python-sklearn-doc/html"
    for part in ("auto_examples", "tutorial", "modules/generated", "_static"):
        (html / part).mkdir()
        (html / part / "b.html").write_text("<p>b")
    return folder


@pytest.fixture(scope="module")
def raw(download, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "raw"
    assert [line.removeprefix(f"{folder}/") for line in write_all(download, folder)] == [
        "fluent: 4 pairs",
        "gimp: 1 pages",
        "sklearn: 3 pages",
        "animations: 2 animations",
        "bunny: 18 frames in 2 parts",
    ]
    return folder


def _read(reader, path):
    return [found for shard in reader.shards(str(path)) for found in reader.read(shard)]


def test_pairs(raw):
    assert sorted(path.name for path in (raw / "fluent").iterdir()) == [
        f"{shard:05d}{end}" for shard in range(3) for end in (".parquet", ".tar", "_stats.json")
    ]
    documents = _read(ImageText(), raw / "fluent")
    assert [document.key for document in documents] == [
        "00000.tar/000000000",
        "00000.tar/000000001",
        "00001.tar/000010000",
        "00001.tar/000010001",
    ]
    assert [document.parts[1].text for document in documents] == list(EMOJI.values())
    with PIL.open(io.BytesIO(documents[0].parts[0].data)) as image:
        assert (image.format, image.size) == ("JPEG", (256, 256))
    assert pq.read_table(raw / "fluent/00000.parquet")["caption"].to_pylist() == ["cat", "dog"]
    assert json.loads((raw / "fluent/00001_stats.json").read_text())["successes"] == 2


def test_animations(raw):
    """The dog stands still."""
    with (raw / "animations/table.csv").open(newline="") as file:
        assert list(csv.reader(file)) == [
            ["file", "text"],
            ["1f408.webp", "cat"],
            ["1f44b-1f3ff.webp", "waving hand: dark skin tone"],
        ]
    documents = _read(Videos(), raw / "animations")
    assert [(len(document.parts), document.parts[-1].text) for document in documents] == [
        (3, "cat"),  # two frames and the text
        (4, "waving hand: dark skin tone"),
    ]


def test_bunny(raw):
    """44 seconds: a part of 16 frames, and one of those at 40 and 42.5 seconds."""
    first, second = _read(Storyboards(), raw / "bunny")
    images = [part for part in first.parts if not isinstance(part, Text)]
    assert (len(first.parts), len(images)) == (30, 16)  # 15 cues, of which two stand between the same frames
    greys = [int(np.asarray(PIL.open(io.BytesIO(image.data))).mean().round()) for image in images]
    np.testing.assert_allclose(greys, [5 * 2.5 * number for number in range(16)], atol=5)
    assert [part.text for part in second.parts if isinstance(part, Text)] == [
        "The big animal lifts its head. It wakes up and yawns with its eyes closed.",
        "It is a rabbit; he looks out of the burrow, his ears hanging down.",
    ]
    assert (raw / "bunny/bunny-01/subtitles.vtt").read_text() == (
        "WEBVTT\n\n"
        "00:00.200 --> 00:02.000\nThe big animal lifts its head.\n\n"
        "00:02.000 --> 00:04.500\nIt wakes up and yawns with its eyes closed.\n\n"
        "00:04.500 --> 00:05.000\nIt is a rabbit; he looks out of the burrow, his ears hanging down.\n"
    )
    assert json.loads((raw / "bunny/bunny-01/info.json").read_text()) == {
        "title": "Big Buck Bunny, part 2",
        "duration": 5.0,
        "licence": "CC BY 3.0",
    }


@pytest.mark.parametrize(
    ("name", "pages"),
    [("gimp", ["a.html"]), ("sklearn", ["auto_examples/b.html", "modules/a.html", "tutorial/b.html"])],
)
def test_pages(raw, name, pages):
    assert sorted(str(path.relative_to(raw / name)) for path in (raw / name).rglob("*.html")) == pages
    (document,) = [found for found in _read(Html(), raw / name) if hasattr(found, "parts")]
    assert [part.text if isinstance(part, Text) else "image" for part in document.parts] == [
        "A cat:",
        "image",
        "asleep.",
    ]


def test_what_is_there_stays(raw, download, tmp_path):
    (tmp_path / "raw" / "fluent").mkdir(parents=True)
    (tmp_path / "raw" / "gimp.partial").mkdir()  # of one that was stopped
    (tmp_path / "raw" / "gimp.partial" / "half.html").touch()
    assert len(list(write_all(download, tmp_path / "raw"))) == 4
    assert sorted(path.name for path in (tmp_path / "raw").iterdir()) == sorted(path.name for path in raw.iterdir())
    assert not list((tmp_path / "raw").rglob("half.html"))
    assert list(write_all(download, raw)) == []


@pytest.mark.parametrize("name", [NAMES, IMAGES, ANIMATIONS, VIDEO, "gimp-help-en", "python-sklearn-doc"])
def test_a_download_that_is_missing(download, tmp_path, name):
    here = tmp_path / "download"
    here.mkdir()
    for path in download.iterdir():
        if path.name != name:
            (here / path.name).symlink_to(path)
    expected = f"{here / name}: no such download; run launch/mixture.sh, which gets it (--dry-run prints how)"
    with pytest.raises(UserError, match=f"^{re.escape(expected)}$"):
        list(write_all(here, tmp_path / "raw"))
    assert not [path for path in (tmp_path / "raw").iterdir() if path.suffix != ".partial" and not any(path.iterdir())]


@pytest.mark.parametrize("damage", ["cut", "empty", "other"])
def test_a_download_that_is_damaged(download, tmp_path, damage):
    here = tmp_path / "download"
    here.mkdir()
    for path in download.iterdir():
        (here / path.name).symlink_to(path)
    (here / VIDEO).unlink()
    whole = (download / VIDEO).read_bytes()
    if damage == "other":
        _tar(here / VIDEO, {"moviepy-2.2.1/README.md": b"moviepy"})
    else:
        (here / VIDEO).write_bytes(whole[: len(whole) // 2] if damage == "cut" else b"")
    with pytest.raises(
        UserError, match=rf"^{here / VIDEO}: damaged \(.*\); remove it and run launch/mixture.sh again$"
    ):
        list(write_all(here, tmp_path / "raw"))
    assert not (tmp_path / "raw" / "bunny").exists()


def test_some_folders_alone(download, tmp_path):
    """The video is enough for the storyboards: other downloads need not be there."""
    (tmp_path / VIDEO).symlink_to(download / VIDEO)
    assert len(list(write_all(tmp_path, tmp_path / "raw", ["bunny"]))) == 1
    assert [path.name for path in (tmp_path / "raw").iterdir()] == ["bunny"]


def test_a_package_without_pages(download, tmp_path):
    (tmp_path / "gimp-help-en").mkdir()
    for path in download.iterdir():
        if path.name != "gimp-help-en":
            (tmp_path / path.name).symlink_to(path)
    with pytest.raises(UserError, match=r"gimp-help-en: no folder of pages '\.' in it; expected the package of Debian"):
        list(write_all(tmp_path, tmp_path / "raw"))


# ---------------------------------------------------------------- the parts


def test_stills():
    """At 0, 2.5 and 5 seconds; the last frame of 5.25 seconds is shown at 5."""
    greys = [int(np.asarray(frame).mean().round()) for frame in stills(_video(5.25), 2.5)]
    np.testing.assert_allclose(greys, [0, 12.5, 25], atol=5)


def test_cut_track():
    cues = [Cue(0.5, 2, "a"), Cue(39.9, 42, "b"), Cue(40, 41.25, "c"), Cue(79, 81, "d"), Cue(80, 82, "e")]
    assert cut_track(cues, 40, 80) == (
        "WEBVTT\n\n00:00.000 --> 00:01.250\nc\n\n00:39.000 --> 00:40.000\nd\n"  # what goes on is cut
    )
    assert cut_track(cues, 100, 140) == "WEBVTT\n"


@given(st.lists(st.integers(0, 200_000), unique=True, min_size=1), st.integers(1, 90))
def test_parts_of_a_track_are_the_track(starts, length):
    starts.sort()
    spans = zip(starts, [*starts[1:], 200_001], strict=True)
    cues = [Cue(start / 1000, end / 1000, f"cue {start}") for start, end in spans]
    parts = [(begin, cut_track(cues, begin, begin + length)) for begin in range(0, 201, length)]
    back = [(begin, cue) for begin, part in parts for cue in parse(part.encode(), "part.vtt").cues]
    assert [cue.text for _, cue in back] == [cue.text for cue in cues]
    assert [round(1000 * (begin + cue.start)) for begin, cue in back] == starts
    assert all(cue.start <= cue.end <= length for _, cue in back)


def test_the_narration():
    """Every cue is read, begins with the video and ends with it, and follows the one before."""
    track = parse(NARRATION.read_bytes(), NARRATION.name)
    assert (len(track.cues), track.skipped) == (208, 0)
    assert (track.cues[0].start, track.cues[-1].end) == (0.5, 596.458)
    assert all(before.end == after.start for before, after in zip(track.cues, track.cues[1:], strict=False))
