"""Images with one text each: img2dataset's folders, other tars of samples, and Parquet files that hold images.

folder | *.tar | *.parquet ─ ImageText ─ RawDocument("00012.tar/000120034", "pair", (RawImage, Text)) | Reject
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, ClassVar

from emu_jax.data.document import Text
from emu_jax.data.raw.files import (
    MAX_IMAGE_BYTES,
    Skip,
    clean_text,
    find_shards,
    opened,
    parse_json,
    shard_name,
    shard_path,
)
from emu_jax.data.raw.reader import RawDocument, RawImage, Reject
from emu_jax.data.raw.tar import RECORD_BYTES, Sample, read_samples
from emu_jax.errors import UserError
from emu_jax.storage import Path

IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "image", "image.bytes")
CAPTIONS = ("txt", "caption", "TEXT", "text")
PARQUET_ROWS = 64  # in memory at once
TARS = ("*.tar", "*.tar.gz", "*.tgz")


def _names(where: str, names: object) -> None:
    if not isinstance(names, tuple) or not names or not all(isinstance(name, str) and name for name in names):
        raise UserError(f"{where}={names!r}; expected one or more names, as ('txt', 'caption')")


@dataclasses.dataclass(frozen=True)
class ImageText:
    """Image-text pairs in tars (img2dataset's, or any in webdataset's form) and in Parquet files that hold images.

    A sample's image is the first of `images` that its members or columns have and that is not empty; its text is the
    first such one of `caption`. Of a list of captions, the first is used. LAION-COCO's own captions are read by
    `caption=("top_caption", "TEXT")`. img2dataset writes Parquet files without images beside its tars; they are
    skipped, and its counts are compared with the contents of the tars.

    Attributes:
      images: extensions of members or names of columns with an encoded image, or with Hugging Face's {bytes, path}.
      caption: extensions of members, fields of the member `json`, or names of columns.
      score: field or column with the similarity of image and text.
      max_characters: longer captions are left out.
      max_member_bytes: larger members of a tar are left out.
      record_bytes: see `read_samples`.
    """

    about: ClassVar[str] = "images with captions: img2dataset's tars, or Parquet"
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
        found = find_shards(path, (*TARS, "*.parquet"), "image-text pairs in tars or parquet files", alone=True)
        tars = {shard.removesuffix(".tar") for shard in found if shard.endswith(".tar")}
        shards = [shard for shard in found if shard.removesuffix(".parquet") not in tars]
        if all(shard.endswith(".parquet") for shard in shards):
            self._check_columns(shards[0])  # otherwise the run would end with nothing but rejects
        return shards

    def read(self, shard: str) -> Iterator[RawDocument | Reject]:
        yield from self._read_parquet(shard) if shard.endswith(".parquet") else self._read_tar(shard)

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
        if whole and shard.endswith(".tar"):
            yield from _compare_count(shard_path(f"{shard.removesuffix('.tar')}_stats.json"), name, samples)

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

    # ------------------------------------------------------------ parquet

    def _columns(self, file: Any) -> tuple[str, list[str]]:
        """The name of the column of images, and of the other columns that are read."""
        types = {field.name: str(field.type) for field in file.schema_arrow}
        names = list(types)
        binary = ("binary", "large_binary", "fixed_size_binary", "struct")  # not columns of paths or addresses
        image = next((name for name in self.images if types.get(name, "").startswith(binary)), "")
        captions = [name for name in self.caption if name in names]
        if not image or not captions:
            raise Skip(
                "no_column",
                f"columns {_listed(names)}; expected an image's bytes in one of {', '.join(self.images)} and a text "
                f"in one of {', '.join(self.caption)}: name yours in the settings images and caption",
            )
        scores = [self.score] if self.score in names and self.score not in captions else []
        return image, captions + scores

    def _check_columns(self, shard: str) -> None:
        try:
            with opened(shard) as data, _open_parquet(data, shard) as file:
                self._columns(file)
        except Skip as skip:
            if skip.reason == "no_column":
                raise UserError(f"{shard}: {skip.detail}") from skip

    def _read_parquet(self, shard: str) -> Iterator[RawDocument | Reject]:
        name = shard_name(shard)
        row = 0
        try:
            with opened(shard) as data, _open_parquet(data, shard) as file:
                image, others = self._columns(file)
                for batch in _batches(file, [image, *others]):
                    for n in range(batch.num_rows):
                        yield self._row(f"{name}/{row:09d}", batch.slice(n, 1), image)
                        row += 1
        except Skip as skip:
            said = f"{name}, row {row}: {skip.detail}" if row else skip.detail
            yield Reject(name, skip.reason, said)

    def _row(self, key: str, table: Any, image: str) -> RawDocument | Reject:
        try:
            (record,) = table.to_pylist()
        except UnicodeDecodeError as error:
            return Reject(key, "unreadable_text", f"a text is not UTF-8 ({error.reason} at byte {error.start})")
        value = record[image]
        if isinstance(value, dict):
            value = value.get("bytes")
        if not isinstance(value, bytes) or not value:
            return Reject(key, "no_image", f"column {image} is empty")
        if len(value) > self.max_member_bytes:
            return Reject(key, "image_too_large", f"{len(value)} bytes; at most {self.max_member_bytes} are read")
        try:
            image_part = RawImage(value, _score(record.get(self.score)))
            return RawDocument(key, self.kind, (image_part, Text(self._caption(record.get))))
        except Skip as skip:
            return skip.reject(key)


def _open_parquet(data: BinaryIO, shard: str) -> Any:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UserError(f"{shard}: reading Parquet needs pyarrow; run `pip install 'emu-jax[prepare]'`") from error
    try:
        return parquet.ParquetFile(data, buffer_size=1 << 20, page_checksum_verification=True)
    except (OSError, pyarrow.ArrowException) as error:
        raise Skip("cut_shard", f"{shard_name(shard)} is not a complete Parquet file ({_one_line(error)})") from error


def _batches(file: Any, columns: list[str]) -> Iterator[Any]:
    import pyarrow

    try:
        yield from file.iter_batches(PARQUET_ROWS, columns=columns, use_threads=False)
    except (OSError, pyarrow.ArrowException) as error:
        raise Skip("cut_shard", f"the file cannot be read further ({_one_line(error)})") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


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
