"""The raw data of `configs/mixture.py`: what launch/mixture.sh downloads -> five folders in the formats of the field.

lobehub-fluent-emoji-3d-1.1.0.tgz, emojibase-data-17.0.0.tgz      ─ fluent/      tars as img2dataset writes them (MIT)
lobehub-fluent-emoji-anim-1-1.0.0.tgz, emojibase-data-17.0.0.tgz  ─ animations/  a table and animated WebP (MIT)
moviepy-2.2.1.tar.gz, bunny.vtt beside this file                  ─ bunny/       a video's storyboards (CC BY 3.0)
gimp-help-en/                                                     ─ gimp/        GIMP's manual, HTML (GFDL 1.2+)
python-sklearn-doc/                                               ─ sklearn/     scikit-learn's guide, HTML (BSD-3)

    python launch/mixture_data.py runs/mixture/download runs/mixture/raw            # or some alone: … raw bunny

A folder gets its name when it is whole; one that is there stays as it is.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import gzip
import hashlib
import io
import json
import shutil
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import av
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image as PIL

from emu_jax.data.fluent_emoji import canonical, image_code
from emu_jax.data.images import decode_image
from emu_jax.data.raw.subtitles import Cue, parse
from emu_jax.errors import UserError

NAMES = "emojibase-data-17.0.0.tgz"
IMAGES = "lobehub-fluent-emoji-3d-1.1.0.tgz"
ANIMATIONS = "lobehub-fluent-emoji-anim-1-1.0.0.tgz"
VIDEO = "moviepy-2.2.1.tar.gz"  # its guide cuts a trailer out of the video
VIDEO_FOLDER = "moviepy-2.2.1/docs/_static/medias/getting_started/moviepy_10_minutes/moviepy_10_minutes.zip"
NARRATION = Path(__file__).with_name("bunny.vtt")

SHARDS, SIDE = 3, 256  # of the pairs: tars, pixels
STEP, FRAMES, FRAME_SIZE = 2.5, 16, (320, 180)  # of a storyboard: seconds between frames, frames, pixels


# ---------------------------------------------------------------- downloads


def _found(path: Path) -> Path:
    if not path.exists():
        raise UserError(f"{path}: no such download; run launch/mixture.sh, which gets it (--dry-run prints how)")
    return path


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tarfile.TarFile]:
    try:
        with tarfile.open(_found(path), "r:gz") as archive:
            yield archive
    except (tarfile.TarError, gzip.BadGzipFile, zipfile.BadZipFile, zlib.error, EOFError, KeyError) as error:
        raise UserError(f"{path}: damaged ({error}); remove it and run launch/mixture.sh again") from error


def _webp(path: Path, names: dict[str, str]) -> Iterator[tuple[str, str, bytes]]:
    """(code, name, bytes) of every emoji of a package that has a name."""
    with _opened(path) as archive:
        for member in archive:  # nothing is extracted to disk by a name of the archive's
            code = canonical(Path(member.name).stem)
            if member.name.endswith(".webp") and code in names:
                yield code, names[code], archive.extractfile(member).read()


def _names(download: Path, coded: Callable[[str], str] = canonical) -> dict[str, str]:
    """The emoji's names by code; `coded`: from the code of a name to that of its image."""
    with _opened(download / NAMES) as archive:
        items = json.load(archive.extractfile("package/en/data.json"))
    return {coded(each["hexcode"]): each["label"] for item in items for each in [item, *item.get("skins", [])]}


# ---------------------------------------------------------------- the five


def write_fluent(download: Path, out: Path) -> str:
    """Images and names as img2dataset leaves them: for each tar a parquet of the same rows, and counts."""
    found = list(_webp(download / IMAGES, _names(download, image_code)))
    size = -(-len(found) // SHARDS)
    for shard in range(SHARDS):
        rows = []
        with tarfile.open(out / f"{shard:05d}.tar", "w") as tar:
            for number, (code, name, data) in enumerate(found[shard * size : (shard + 1) * size]):
                image = PIL.fromarray(decode_image(data, code))
                jpeg = io.BytesIO()
                image.resize((SIDE, SIDE)).save(jpeg, "JPEG", quality=92)
                row = {
                    "key": f"{shard:05d}{number:04d}",
                    "caption": name,
                    "url": f"fluent-emoji/{code}.webp",
                    "status": "success",
                    "error_message": None,
                    "width": SIDE,
                    "height": SIDE,
                    "original_width": image.width,
                    "original_height": image.height,
                    "sha256": hashlib.sha256(data).hexdigest(),
                }
                rows.append(row)
                members = {"jpg": jpeg.getvalue(), "json": json.dumps(row).encode(), "txt": name.encode()}
                for extension, content in members.items():
                    member = tarfile.TarInfo(f"{row['key']}.{extension}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        pq.write_table(pa.Table.from_pylist(rows), out / f"{shard:05d}.parquet")
        stats = {"count": len(rows), "successes": len(rows), "failed_to_download": 0, "failed_to_resize": 0}
        (out / f"{shard:05d}_stats.json").write_text(json.dumps(stats | {"status_dict": {"success": len(rows)}}))
    return f"{len(found):,} pairs"


def write_animations(download: Path, out: Path) -> str:
    """Animated WebP and a table of their names; half of the package's images stand still and are left out."""
    rows = []
    for code, name, data in _webp(download / ANIMATIONS, _names(download)):
        with PIL.open(io.BytesIO(data)) as image:
            moves = getattr(image, "n_frames", 1) > 1
        if moves:
            (out / f"{code}.webp").write_bytes(data)
            rows.append([f"{code}.webp", name])
    with (out / "table.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["file", "text"], *sorted(rows)])
    return f"{len(rows):,} animations"


def write_bunny(download: Path, out: Path) -> str:
    """The video in parts of 40 seconds, each a folder of frames, with what the narration says meanwhile."""
    cues = parse(NARRATION.read_bytes(), NARRATION.name).cues
    with (
        _opened(download / VIDEO) as archive,
        zipfile.ZipFile(io.BytesIO(archive.extractfile(VIDEO_FOLDER).read())) as files,
    ):
        video = files.read("moviepy_10_minutes/resources/bbb.mp4")
    counts: list[int] = []  # the frames of each part
    for number, frame in enumerate(stills(video, STEP)):
        part, place = divmod(number, FRAMES)
        folder = out / f"bunny-{part:02d}"
        if not place:
            folder.mkdir()
            counts.append(0)
        frame.resize(FRAME_SIZE).save(folder / f"frame_{place}.jpg", quality=85)
        counts[part] += 1
    for part, count in enumerate(counts):
        folder, begin = out / f"bunny-{part:02d}", part * FRAMES * STEP
        (folder / "subtitles.vtt").write_text(cut_track(cues, begin, begin + count * STEP), encoding="utf-8")
        info = {"title": f"Big Buck Bunny, part {part + 1}", "duration": count * STEP, "licence": "CC BY 3.0"}
        (folder / "info.json").write_text(json.dumps(info))
    return f"{sum(counts)} frames in {len(counts)} parts"


def write_gimp(download: Path, out: Path) -> str:
    """The English manual, whole; the folder's name in the package holds GIMP's version."""
    package = _found(download / "gimp-help-en")
    return _copy_pages(package, next(package.glob("usr/share/gimp/*/help/en"), None), ["."], out)


def write_sklearn(download: Path, out: Path) -> str:
    """User guide, examples and tutorials, without the pages of the API."""
    package = _found(download / "python-sklearn-doc")
    parts = ["_images", "auto_examples", "modules", "tutorial"]
    return _copy_pages(package, package / "usr/share/doc/python-sklearn-doc/html", parts, out)


# ---------------------------------------------------------------- their parts


def stills(video: bytes, step: float) -> Iterator[PIL.Image]:
    """The first frame at or after each multiple of `step` seconds."""
    with av.open(io.BytesIO(video)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        number = 0
        for frame in container.decode(stream):
            if frame.time + 1e-6 >= number * step:
                yield frame.to_image()
                number += 1


def cut_track(cues: Iterable[Cue], begin: float, end: float) -> str:
    """WebVTT of the cues that begin in [begin, end) seconds, on a clock that starts at `begin`."""
    blocks = ["WEBVTT"]
    for cue in cues:
        if begin <= cue.start < end:
            blocks.append(f"{_clock(cue.start - begin)} --> {_clock(min(cue.end, end) - begin)}\n{cue.text}")
    return "\n\n".join(blocks) + "\n"


def _clock(seconds: float) -> str:
    milliseconds = round(seconds * 1000)
    return f"{milliseconds // 60_000:02d}:{milliseconds // 1000 % 60:02d}.{milliseconds % 1000:03d}"


def _copy_pages(package: Path, pages: Path | None, parts: Iterable[str], out: Path) -> str:
    """Copies folders of HTML pages and their images out of an unpacked package."""
    for part in parts:
        if pages is None or not (pages / part).is_dir():
            raise UserError(
                f"{package}: no folder of pages {part!r} in it; expected the package of Debian or Ubuntu, remove the "
                "folder and run launch/mixture.sh again"
            )
        # API pages, a class each: `generated` below modules.
        shutil.copytree(pages / part, out / part, ignore=shutil.ignore_patterns("generated"), dirs_exist_ok=True)
    return f"{sum(1 for _ in out.rglob('*.html')):,} pages"


WRITERS = {
    "fluent": write_fluent,
    "gimp": write_gimp,
    "sklearn": write_sklearn,
    "animations": write_animations,
    "bunny": write_bunny,
}


def write_all(download: Path, raw: Path, names: Iterable[str] = ()) -> Iterator[str]:
    """Writes the folders that are not there, all or those named; tells of each what it holds."""
    for name in names or WRITERS:
        write = WRITERS[name]
        if (raw / name).exists():
            continue
        partial = raw / f"{name}.partial"
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            told = write(download, partial)
            partial.rename(raw / name)
        except OSError as error:
            where = error.filename or partial
            raise UserError(f"{where}: {error.strerror or error}; see to it and run launch/mixture.sh again") from error
        yield f"{raw / name}: {told}"


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the raw data of configs/mixture.py.")
    parser.add_argument("download", type=Path, help="the folder of downloads")
    parser.add_argument("raw", type=Path, help="the folder to write")
    parser.add_argument("names", nargs="*", choices=[[], *WRITERS], metavar="NAME", help="the folders (default: all)")
    options = parser.parse_args()
    try:
        for line in write_all(options.download, options.raw, options.names):
            print(line, flush=True)
    except UserError as error:
        print(f"launch/mixture_data.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
