"""Videos with a caption: a CSV of names and captions, and the files -> up to 24 frames each, then the text.

The table is a CSV, or a folder of several, with one of these headers:

    videoid, name, page_dir, …     WebVid's: the video is <folder>/<page_dir>/<videoid>.mp4 or <folder>/<videoid>.mp4
    file, text                     any: the file is relative to the folder; videos and animated WebP, GIF and PNG

Words that sell a video and do not describe it are removed from WebVid's captions (`METADATA`).
"""

from __future__ import annotations

import csv
import dataclasses
import itertools
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, ClassVar

from emu_jax.data.document import Text
from emu_jax.data.frames import STORED
from emu_jax.data.raw.files import LOCAL, Skip
from emu_jax.data.raw.reader import RawDocument, Reject
from emu_jax.data.raw.video_files import stored_frames
from emu_jax.errors import UserError
from emu_jax.storage import check_local

# ---------------------------------------------------------------- captions

_MONTH = (
    r"(?:jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?|sept?(?:ember)?|oct(?:ober)?|"
    r"nov(?:ember)?|dec(?:ember)?)\.?"
)
_DAY, _YEAR = r"\d{1,2}(?:st|nd|rd|th)?", r"(?:19|20)\d\d"
_WHEN = r"(?:[-–]\s*|\b(?:on|in)\s+)?\b"  # what precedes a date
_SIZE = r"\d{3,4}\s?[x×]\s?\d{3,4}p?|(?:720|1080|1440|2160)[pi]|(?:(?:ultra|full)[\s-]?)?u?hdr?|fhd|[468]k"

# Inferred: it is published that rules stripped metadata words, but not which rules. How a video was shot (slow motion,
# time lapse, aerial, close up) is visible in it and stays.
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
# Leftovers around a removed word: empty brackets, repeated commas, dangling prepositions.
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
    """Removes from a stock video's caption whatever does not describe the video; other captions are unchanged.

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
    """One document per row of the table.

    Attributes:
      folder: folder of the files; "" is the CSV's own.
      frames: number of frames stored per video, spread over it; all of a shorter one (`frames.spread_indices`).
        Training shows some of them.
      strip: whether to apply `strip_metadata` to WebVid's captions; captions of a table of file and text are unchanged.
      shard_rows: rows per shard.
    """

    about: ClassVar[str] = "videos and animations with captions: a CSV, as WebVid's"
    kind: ClassVar[str] = "video"
    folder: str = ""
    frames: int = STORED
    strip: bool = True
    shard_rows: int = 1000

    def __post_init__(self):
        for name in ("frames", "shard_rows"):
            if getattr(self, name) < 1:
                raise UserError(f"Videos: {name}={getattr(self, name)}; expected at least 1")

    def shards(self, path: str) -> list[str]:
        """`<csv>@<first byte>:<first row>+<rows>`, for one CSV or all in a folder."""
        place = check_local(path, LOCAL)
        tables = sorted(place.glob("*.csv")) if place.is_dir() else [place]
        if not tables or not tables[0].is_file():
            raise UserError(f"{path}: no CSV of videos here; expected a .csv file, or a folder that holds some")
        if self.folder and not check_local(self.folder, LOCAL).is_dir():
            raise UserError(f"{self.folder}: no such folder; expected the folder of the videos of {path}")
        shards = []
        for table in tables:
            with table.open("rb") as file:
                _Columns.of(file, table)
                start, first, rows = file.tell(), 0, 0
                for _ in table_rows(file):
                    rows += 1
                    if rows == self.shard_rows:
                        shards.append(f"{table}@{start}:{first}+{rows}")
                        start, first, rows = file.tell(), first + rows, 0
                if rows:
                    shards.append(f"{table}@{start}:{first}+{rows}")
        if not shards:
            raise UserError(f"{path}: no rows below the header; expected one for each video")
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
            for row in itertools.islice(table_rows(file), int(rows)):
                yield self._document(f"{table.name}/{number:08d}", row, columns, folder)
                number += 1
        if number < int(first) + int(rows):
            missing = f"row {number}, {int(first) + int(rows) - number} before the end"
            yield Reject(shard, "cut_shard", f"the table ends at {missing}", whole=False)

    def _document(self, key: str, row: list[str] | csv.Error, columns: _Columns, folder: Path) -> RawDocument | Reject:
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
            return Reject(key, "missing_video", f"{names[0]} is outside the folder of videos")
        path = next((folder / name for name in names if (folder / name).is_file()), None)
        if path is None:
            return Reject(key, "missing_video", f"no file {' or '.join(names)}")
        try:
            return RawDocument(key, self.kind, (*stored_frames(path, self.frames), Text(text)))
        except Skip as skip:
            return skip.reject(key)


@dataclasses.dataclass(frozen=True)
class _Columns:
    """The columns of a table, from its header."""

    names: tuple[str, ...]

    @classmethod
    def of(cls, file, table: Path) -> _Columns:
        """Reads the header, and leaves `file` after it."""
        header = next(table_rows(file), [])
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
        """The paths at which the row's video may be, relative to the folder."""
        if not self.is_webvid:
            return [row[self.names.index("file")].strip()]
        name = row[self.names.index("videoid")].strip() + ".mp4"
        page = row[self.names.index("page_dir")].strip() if "page_dir" in self.names else ""
        return [os.path.join(page, name), name] if page else [name]


def table_rows(file: BinaryIO) -> Iterator[list[str] | csv.Error]:
    """The rows from the file's position on, without empty lines; the file's position is after each yielded row.

    A quoted cell may hold line breaks. Where a quote is not closed, or closes inside another row's text, only the line
    that opens it is an error: the lines after it are rows again.
    """

    def lines() -> Iterator[str]:
        # A longer line is not a table's: it is divided into rows of the wrong number of columns.
        while line := file.readline(1 << 20):
            text = line.decode("utf-8", errors="replace")
            yield text.removeprefix("\ufeff") if file.tell() == len(line) else text

    while True:
        start, found = file.tell(), lines()
        first = next(found, None)
        if first is None:
            return
        after = file.tell()
        try:
            row = next(csv.reader(itertools.chain([first], found), strict=True))
        except csv.Error as error:
            if file.tell() > after:
                error = csv.Error(f"a quote in the line at byte {start} is not closed ({error})")
                file.seek(after)
            yield error
            continue
        if row:
            yield row


READER = Videos
