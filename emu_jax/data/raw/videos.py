"""Clips with a caption: a table of them and the files -> up to 24 frames each, then the text.

The table is a CSV, or a folder of them, with a header of

    videoid, name, page_dir, …     WebVid's: the clip is <folder>/<page_dir>/<videoid>.mp4 or <folder>/<videoid>.mp4
    file, text                     any: the file is relative to the folder; videos and animated WebP, GIF and PNG

From WebVid's captions go the words that sell a clip and do not tell what is in it (`METADATA`).
"""

from __future__ import annotations

import csv
import dataclasses
import itertools
import os
import re
from collections.abc import Iterator
from pathlib import Path

from emu_jax.data.document import Text
from emu_jax.data.frames import STORED, spread_indices
from emu_jax.data.raw.reader import RawDocument, RawImage, Reject
from emu_jax.data.video import VideoError, read_frames
from emu_jax.errors import UserError

# ---------------------------------------------------------------- captions

_MONTH = (
    r"(?:jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?|sept?(?:ember)?|oct(?:ober)?|"
    r"nov(?:ember)?|dec(?:ember)?)\.?"
)
_DAY, _YEAR = r"\d{1,2}(?:st|nd|rd|th)?", r"(?:19|20)\d\d"
_WHEN = r"(?:[-–]\s*|\b(?:on|in)\s+)?\b"  # what goes with a date
_SIZE = r"\d{3,4}\s?[x×]\s?\d{3,4}p?|(?:720|1080|1440|2160)[pi]|(?:(?:ultra|full)[\s-]?)?u?hdr?|fhd|[468]k"

# Inferred: that words of metadata were stripped by rules is published, the rules are not. How a clip was shot (slow
# motion, time lapse, aerial, close up) can be seen in it and stays.
METADATA: tuple[tuple[str, str], ...] = (
    ("use", r"\(?(?:for )?editorial use(?: only)?\)?|(?:model|property) released|royalty[\s-]free"),
    ("loop", r"(?:can be used as (?:an? )?)?\bloop item\b|\bloop(?:able|[\s-]ready)\b"),
    ("loop", r"(?:with (?:an? )?)?\bseamless(?:ly)? loop(?:ing|able|ed)?\b(?: of\b)?"),
    (
        "transparency",
        r"(?:(?:has|with|includes?|including|and) )?(?:an? )?\b(?:alpha (?:channel|matte)|luma matte)s?\b",
    ),
    ("encoding", r"(?:(?:in|with) )?\b(?:apple )?pro\s?res\b(?: (?:4444|422))?(?: hq)?(?: codec)?"),
    ("encoding", r"(?:(?:in|with) )?\b(?:h\.?26[45]|photo[\s-]?jpe?g)\b(?: codec)?"),
    (
        "camera",
        r"\b(?:shot|filmed|recorded|captured) (?:on|with|by) (?:an? |the )?(?:red (?:epic|dragon|weapon|scarlet|helium|"
        r"gemini|komodo|raven|one|camera)|arri(?: alexa)?|sony|canon|nikon|panasonic|blackmagic|gopro|dji)\b"
        r"(?:[\s-](?:[a-z]{0,3}\d+[a-z]{0,3}|mini|pro|hero|mark|mavic|phantom|cinema|camera|ii|iii|iv)\b)*",
    ),
    ("frames a second", r"(?:\b(?:at|in) )?\b\d{2,3}(?:\.\d+)?\s?(?:fps\b|frames (?:per|a) second)"),
    (
        "resolution",
        rf"(?:\band )?(?:\bit(?:'|’| i)s )?(?:\b(?:in|at) )?\b(?:{_SIZE})\b(?:[\s,/-]+(?:{_SIZE})\b)*"
        r"(?: (?:video|footage|clip)\b)?(?: (?:resolution|quality|definition|format)\b)?",
    ),
    ("resolution", r"(?:\b(?:in|at) )?\b(?:ultra |full )?high[\s-]definition\b(?: (?:video|footage|clip)\b)?"),
    ("date", rf"{_WHEN}{_DAY}\s+{_MONTH},?\s+{_YEAR}\b"),
    ("date", rf"{_WHEN}{_MONTH}\s+(?:{_DAY},?\s+)?{_YEAR}\b"),
    ("date", rf"{_WHEN}\d{{1,2}}([./-])\d{{1,2}}\1{_YEAR}\b"),
    ("date", rf"(?:[-–]\s*)?\bcirca {_YEAR}s?\b"),
    ("kind", r"\b(?:stock (?:footage|video|clip)|footage\s?/\s?video|video\s?/\s?footage|b-roll)\b(?: of\b)?"),
    ("number", r"\b(?:clip(?: id)?|footage id|version|ver\.)\s?[#:]?\s?\d+\b|#\s?\d+\b|\b\d{6,}\b"),
)
_PATTERNS = tuple(re.compile(pattern, re.IGNORECASE) for _, pattern in METADATA)
# What stands around a word that is gone: brackets, commas in a row, ends.
_TIDY = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"[(\[]\s*[)\]]", " "),
        (r"\s+", " "),
        (r"\.(?: \.)+", "."),
        (r"\s+(?=[,.;:!?])", ""),
        (r"(?:[,;:–-]\s?)+(?=[,;:])", ""),
        (r"[,;:]\s?\.", "."),
        (r"(?: (?:in|at|with|on|and|by|of))+(?=\.?$)", ""),
        (r"^[\s,.;:|/–-]+|[\s,;:|/–-]+$", ""),
    )
)


def strip_metadata(caption: str) -> str:
    """A stock clip's caption without what does not tell what is in the clip; others come back as they are.

    >>> strip_metadata("Slow motion of a bee, 4k footage, shot on Sony A7")
    'Slow motion of a bee'
    """
    text = caption
    for pattern in _PATTERNS:
        text = pattern.sub(" ", text)
    if text == caption:
        return caption
    for pattern, replacement in _TIDY:
        text = pattern.sub(replacement, text)
    return text


# ---------------------------------------------------------------- the reader


@dataclasses.dataclass(frozen=True)
class Videos:
    """Reads clips and their captions.

    Attributes:
      folder: where the files lie; "" is the CSV's own folder.
      frames: stored of a clip, spread over it; all of a shorter one (`frames.spread_indices`). Training shows some of
        them.
      strip: whether `strip_metadata` goes over WebVid's captions; those of a table of file and text stay.
      shard_rows: how many clips are read together.
    """

    folder: str = ""
    frames: int = STORED
    strip: bool = True
    shard_rows: int = 1000

    def __post_init__(self):
        for name in ("frames", "shard_rows"):
            if getattr(self, name) < 1:
                raise UserError(f"Videos: {name}={getattr(self, name)}; expected at least 1")

    def shards(self, path: str) -> list[str]:
        """`<csv>@<byte where it begins>:<its first row>+<rows>`, of a CSV or of a folder's."""
        place = Path(path)
        tables = sorted(place.glob("*.csv")) if place.is_dir() else [place]
        if not tables or not tables[0].is_file():
            raise UserError(f"{path}: no CSV of videos here; expected a .csv file, or a folder that holds some")
        if self.folder and not Path(self.folder).is_dir():
            raise UserError(f"{self.folder}: no such folder; expected the one that holds the videos of {path}")
        shards = []
        for table in tables:
            with table.open("rb") as file:
                _Columns.of(file, table)
                start, first, rows = file.tell(), 0, 0
                for _ in _rows(file):
                    rows += 1
                    if rows == self.shard_rows:
                        shards.append(f"{table}@{start}:{first}+{rows}")
                        start, first, rows = file.tell(), first + rows, 0
                if rows:
                    shards.append(f"{table}@{start}:{first}+{rows}")
        if not shards:
            raise UserError(f"{path}: no rows below the header; expected a line for each video")
        return shards

    def read(self, shard: str) -> Iterator[RawDocument | Reject]:
        if (named := re.fullmatch(r"(.*)@(\d+):(\d+)\+(\d+)", shard, re.DOTALL)) is None:
            raise UserError(f"{shard}: not one of this reader's shards; expected CSV@BYTE:ROW+ROWS")
        name, start, first, rows = named.groups()
        table, number = Path(name), int(first)
        folder = Path(self.folder) if self.folder else table.parent
        with table.open("rb") as file:
            columns = _Columns.of(file, table)
            file.seek(int(start))
            for row in itertools.islice(_rows(file), int(rows)):
                yield self._clip(f"{table.name}/{number:08d}", row, columns, folder)
                number += 1
        if number < int(first) + int(rows):
            missing = f"row {number}, {int(first) + int(rows) - number} before the end"
            yield Reject(shard, "cut_shard", f"the table ends at {missing}", whole=False)

    def _clip(self, key: str, row: list[str] | csv.Error, columns: _Columns, folder: Path) -> RawDocument | Reject:
        if isinstance(row, csv.Error) or len(row) != columns.count:
            found = f"{len(row)} columns" if isinstance(row, list) else f"{row}"
            return Reject(key, "unreadable_row", f"{found}; expected {columns.count} columns")
        text = " ".join(row[columns.text].split())
        if "\ufffd" in text:
            return Reject(key, "unreadable_text", "not UTF-8")
        if columns.is_webvid and self.strip:
            text = strip_metadata(text)
        if not text:
            return Reject(key, "no_text", "the caption is empty")
        names = [os.path.normpath(name) for name in columns.files(row)]
        if any(os.path.isabs(name) or name.startswith("..") for name in names):
            return Reject(key, "missing_video", f"{names[0]} is not inside the folder of videos")
        path = next((folder / name for name in names if (folder / name).is_file()), None)
        if path is None:
            return Reject(key, "missing_video", f"no file {' or '.join(names)}")
        try:
            frames = read_frames(path, self.frames, spread_indices)
        except VideoError as error:
            return Reject(key, error.reason, f"{path.name}: {error.detail}")
        except OSError as error:
            return Reject(key, "unreadable_video", f"{path.name}: {error.strerror}")
        return RawDocument(key, "video", (*(RawImage(frame) for frame in frames), Text(text)))


@dataclasses.dataclass(frozen=True)
class _Columns:
    """Where a table's columns stand."""

    names: tuple[str, ...]

    @classmethod
    def of(cls, file, table: Path) -> _Columns:
        """From the header, and leaves `file` behind it."""
        header = next(_rows(file), [])
        columns = cls(tuple(name.strip().lower() for name in header) if isinstance(header, list) else ())
        if not ({"file", "text"} <= set(columns.names) or columns.is_webvid):
            raise UserError(
                f"{table}: its first line is {','.join(columns.names)[:80]!r}; expected a header with the columns "
                "file and text, or WebVid's videoid and name"
            )
        return columns

    @property
    def count(self) -> int:
        return len(self.names)

    @property
    def is_webvid(self) -> bool:
        return {"videoid", "name"} <= set(self.names)

    @property
    def text(self) -> int:
        return self.names.index("name" if self.is_webvid else "text")

    def files(self, row: list[str]) -> list[str]:
        """Where the clip may lie, relative to the folder."""
        if not self.is_webvid:
            return [row[self.names.index("file")].strip()]
        name = row[self.names.index("videoid")].strip() + ".mp4"
        page = row[self.names.index("page_dir")].strip() if "page_dir" in self.names else ""
        return [os.path.join(page, name), name] if page else [name]


def _rows(file) -> Iterator[list[str] | csv.Error]:
    """The rows from where `file` stands, which is behind a row when it is given; empty lines are none."""

    def lines() -> Iterator[str]:
        # Longer ones are no table's: they end in a row that does not fit.
        while line := file.readline(1 << 20):
            yield line.decode("utf-8", errors="replace").removeprefix("\ufeff")

    reader = csv.reader(lines())
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield error
            continue
        if row:
            yield row
