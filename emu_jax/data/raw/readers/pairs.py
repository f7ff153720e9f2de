"""Images with one text each: img2dataset's folders, other tars of samples, and tables that hold images.

folder | *.tar | *.parquet | *.arrow ─ ImageText ─ RawDocument("00012.tar/000120034", "pair", (RawImage, Text)) | Reject
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

from emu_jax.data.document import Text
from emu_jax.data.raw.files import (
    MAX_IMAGE_BYTES,
    Skip,
    clean_text,
    find_shards,
    parse_json,
    shard_name,
    shard_path,
)
from emu_jax.data.raw.reader import RawDocument, RawImage, Reject
from emu_jax.data.raw.rows import without_twins
from emu_jax.data.raw.tables import SUFFIXES, open_table, rows_of
from emu_jax.data.raw.tar import RECORD_BYTES, Sample, read_samples
from emu_jax.errors import UserError
from emu_jax.storage import Path

IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "image", "image.bytes")
CAPTIONS = ("txt", "caption", "TEXT", "text")
TABLE_ROWS = 64  # in memory at once
TARS = (".tar", ".tar.gz", ".tgz", ".tar.zst", ".tzst")


def _names(where: str, names: object) -> None:
    if not isinstance(names, tuple) or not names or not all(isinstance(name, str) and name for name in names):
        raise UserError(f"{where}={names!r}; expected one or more names, as ('txt', 'caption')")


@dataclasses.dataclass(frozen=True)
class ImageText:
    """Image-text pairs in tars (img2dataset's, or any in webdataset's form), and in Parquet and Arrow with images.

    A sample's image is the first of `images` that its members or columns have and that is not empty; its text is the
    first such one of `caption`. Of a list of captions, the first is used. LAION-COCO's own captions are read by
    `caption=("top_caption", "TEXT")`. img2dataset writes Parquet files without images beside its tars; they are
    skipped, and its counts are compared with the contents of the tars.

    Attributes:
      images: extensions of members or names of columns with an encoded image, or with Hugging Face's {bytes, path}.
      caption: extensions of members, fields of the member `json`, or names of columns. A field of a column is named by
        a dot, as in `meta.caption`; so are columns of images.
      score: field or column with the similarity of image and text.
      max_characters: longer captions are left out.
      max_member_bytes: larger members of a tar are left out.
      record_bytes: see `read_samples`.
    """

    about: ClassVar[str] = "images with captions: img2dataset's tars, Parquet or Arrow"
    kind: ClassVar[str] = "pair"
    images: tuple[str, ...] = IMAGES
    caption: tuple[str, ...] = CAPTIONS
    score: str = "similarity"
    max_characters: int = 10_000
    max_member_bytes: int = MAX_IMAGE_BYTES
    record_bytes: int = RECORD_BYTES

    def __post_init__(self):
        _names("ImageText.images", self.images)
        _names("ImageText.caption", self.caption)

    def shards(self, path: str) -> list[str]:
        patterns = (*(f"*{end}" for end in TARS), *(f"*{end}" for end in SUFFIXES))
        expected = "image-text pairs in tars, Parquet or Arrow files"
        found = without_twins(find_shards(path, patterns, expected, alone=True))
        tars = {_without(shard, TARS) for shard in found if shard.endswith(TARS)}
        shards = [shard for shard in found if shard.endswith(TARS) or _without(shard, (".parquet",)) not in tars]
        if all(shard.endswith(SUFFIXES) for shard in shards):
            self._check_columns(shards[0])  # otherwise the run would end with nothing but rejects
        return shards

    def read(self, shard: str) -> Iterator[RawDocument | Reject]:
        yield from self._read_table(shard) if shard.endswith(SUFFIXES) else self._read_tar(shard)

    # ------------------------------------------------------------ tars

    def _read_tar(self, shard: str) -> Iterator[RawDocument | Reject]:
        name = shard_name(shard)
        samples, whole = 0, True
        for sample in read_samples(shard, self.max_member_bytes, self.record_bytes):
            if isinstance(sample, Reject):
                whole = whole and sample.reason != "cut_shard"
                samples += sample.reason == "repeated_key"
                yield sample
                continue
            samples += 1
            yield from self._sample(f"{name}/{sample.name}", sample)
        if whole:
            yield from _compare_count(shard_path(f"{_without(shard, TARS)}_stats.json"), name, samples)

    def _sample(self, key: str, sample: Sample) -> Iterator[RawDocument | Reject]:
        fields: dict[str, Any] = {}
        broken = None
        if "json" in sample.members:
            try:
                fields = parse_json(sample.members["json"])
                if not isinstance(fields, dict):
                    raise Skip("unreadable_json", f"expected an object, got {type(fields).__name__}")
            except Skip as skip:
                fields, broken = {}, Skip("unreadable_json", skip.detail)
        try:
            data = next((sample.members[name] for name in self.images if sample.members.get(name)), None)
            if data is None:
                raise Skip("no_image", f"members {_listed(sample.members)}; expected one of {', '.join(self.images)}")
            caption = self._caption(lambda name: _member_text(sample.members, name, fields))
        except Skip as skip:
            # The caption may have been in the broken JSON, which is then the real fault.
            yield (broken if broken and skip.reason == "no_text" else skip).reject(key)
            return
        if broken:  # only the score or a better caption is lost, not the pair
            yield broken.reject(f"{key}.json", whole=False)
        yield RawDocument(key, self.kind, (RawImage(data, _score(fields.get(self.score))), Text(caption)))

    def _caption(self, get: Callable[[str], Any]) -> str:
        for name in self.caption:
            value = get(name)
            options = value if isinstance(value, list) else [value]
            for option in options:
                if isinstance(option, str) and (text := clean_text(option, self.max_characters)):
                    return text
        raise Skip("no_text", f"none of {', '.join(self.caption)} holds text")

    # ------------------------------------------------------------ tables

    def _columns(self, schema: Any) -> tuple[str, list[str]]:
        """The path of the images, and the columns that are read, its own first."""
        image = next((path for path in self.images if _holds_images(_type_at(schema, path))), "")
        captions = [path for path in self.caption if _type_at(schema, path) is not None]
        if not image or not captions:
            raise Skip(
                "no_column",
                f"columns {_listed(schema.names)}; expected an image's bytes in one of {', '.join(self.images)} and a "
                f"text in one of {', '.join(self.caption)}: name yours in the settings images and caption",
            )
        scores = [self.score] if _type_at(schema, self.score) is not None else []
        return image, list(dict.fromkeys(_column(schema.names, path) for path in (image, *captions, *scores)))

    def _check_columns(self, shard: str) -> None:
        try:
            with open_table(shard) as table:
                self._columns(table.schema)
        except Skip as skip:
            if skip.reason == "no_column":
                raise UserError(f"{shard}: {skip.detail}") from skip

    def _read_table(self, shard: str) -> Iterator[RawDocument | Reject]:
        name = shard_name(shard)
        number = 0
        try:
            with open_table(shard) as table:
                image, columns = self._columns(table.schema)
                for batch in table.batches(TABLE_ROWS, columns):
                    for row in rows_of(batch):
                        key = f"{name}/{number:09d}"
                        yield row.reject(key) if isinstance(row, Skip) else self._row(key, row, image)
                        number += 1
        except Skip as skip:
            said = f"{name}, row {number}: {skip.detail}" if number else skip.detail
            yield Reject(name, skip.reason, said)

    def _row(self, key: str, row: dict[str, Any], image: str) -> RawDocument | Reject:
        try:
            data = _image_in(_cell(row, image), image)
            if len(data) > self.max_member_bytes:
                raise Skip("image_too_large", f"{len(data)} bytes; at most {self.max_member_bytes} are read")
            caption = self._caption(lambda path: _cell(row, path))
        except Skip as skip:
            return skip.reject(key)
        return RawDocument(key, self.kind, (RawImage(data, _score(_cell(row, self.score))), Text(caption)))


def _column(names: Sequence[str], path: str) -> str:
    """The column of a path: the path itself if it is a column's name, otherwise what is before its first dot."""
    return path if path in names else path.partition(".")[0]


def _type_at(schema: Any, path: str) -> Any:
    """The type at a path such as `image` or `meta.caption`; None if there is none."""
    import pyarrow

    column = _column(schema.names, path)
    if column not in schema.names:
        return None
    kind = schema.field(column).type
    for name in path.removeprefix(column).split(".")[1:]:
        if not pyarrow.types.is_struct(kind) or kind.get_field_index(name) < 0:
            return None
        kind = kind.field(name).type
    return kind


def _holds_images(kind: Any) -> bool:
    """Whether a type is of bytes, or of Hugging Face's {bytes, path}, or a list of them; not of paths or addresses."""
    inner = str(kind.value_type) if hasattr(kind, "value_type") else str(kind)
    return inner.startswith(("binary", "large_binary", "fixed_size_binary", "struct"))


def _cell(row: dict[str, Any], path: str) -> Any:
    """The value at a path; None if there is none."""
    column = _column(list(row), path)
    value = row.get(column)
    for name in path.removeprefix(column).split(".")[1:]:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _image_in(value: Any, column: str) -> bytes:
    """The one image of a cell.

    Raises:
      Skip: there is none, or there are several.
    """
    if isinstance(value, list):
        if len(value) > 1:
            raise Skip("unread_field", f"column {column} holds {len(value)} images; a pair has one")
        value = value[0] if value else None
    if isinstance(value, dict):
        value = value.get("bytes")
    if not isinstance(value, bytes) or not value:
        raise Skip("no_image", f"column {column} is empty")
    return value


def _without(shard: str, ends: Sequence[str]) -> str:
    """A shard's name without the first of the ends that it has."""
    return next((shard.removesuffix(end) for end in ends if shard.endswith(end)), shard)


def _listed(names: Any) -> str:
    return ", ".join(sorted(names))[:200] or "none"


def _member_text(members: dict[str, bytes], name: str, fields: dict[str, Any]) -> Any:
    if name not in members or name == "json":
        return fields.get(name)
    try:
        return members[name].decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Skip("unreadable_text", f".{name} is not UTF-8 ({error.reason} at byte {error.start})") from error


def _score(value: object) -> float | None:
    return value if isinstance(value, float) and abs(value) <= 1 else None  # NaN is not


def _compare_count(stats: Path, name: str, samples: int) -> Iterator[Reject]:
    """Compares a tar with img2dataset's count: a tar can lose samples and still end properly."""
    if not stats.is_file():
        return
    try:
        content = parse_json(stats.read_bytes())
        stated = content.get("successes", "no") if isinstance(content, dict) else "no"
    except Skip:
        stated = "no readable"
    if stated != samples:
        detail = f"{samples} samples; {stats.name} states {stated} successes"
        yield Reject(name, "count_differs", detail, whole=False)


READER = ImageText
