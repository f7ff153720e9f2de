"""Images with a text each: img2dataset's folders and other tars of samples, parquet files that hold images, COCO.

folder | *.tar | *.parquet     ─ ImageText ─ RawDocument("00012.tar/000120034", "pair", (RawImage, Text)) | Reject
annotations/captions_*.json    ─ Coco      ─ …
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from emu_jax.data.document import Text
from emu_jax.data.raw.files import (
    MAX_IMAGE_BYTES,
    Skip,
    check_folder,
    clean_text,
    find_shards,
    parse_json,
    read_image,
    shard_name,
)
from emu_jax.data.raw.reader import RawDocument, RawImage, Reject
from emu_jax.data.raw.tar import RECORD_BYTES, Sample, read_samples
from emu_jax.errors import UserError

IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "image", "image.bytes")
CAPTIONS = ("txt", "caption", "TEXT", "text")
ROWS = 64  # of a parquet file, held at a time
TARS = ("*.tar", "*.tar.gz", "*.tgz")
MAX_CHARACTERS = 10_000


def _names(where: str, names: object) -> None:
    if not isinstance(names, tuple) or not names or not all(isinstance(name, str) and name for name in names):
        raise UserError(f"{where}={names!r}; expected one or more names, as ('txt', 'caption')")


def _pair(key: str, image: RawImage, caption: str) -> RawDocument:
    return RawDocument(key, "pair", (image, Text(caption)))


@dataclasses.dataclass(frozen=True)
class ImageText:
    """Image-text pairs in tars (img2dataset's, or any of webdataset's form) and in parquet files that hold images.

    Of a sample's members, of the fields of its `json` and of a parquet's columns, the first of `images` and the first
    of `caption` that holds something is taken; a list of captions counts as its first. LAION-COCO's own captions are
    read by `caption=("top_caption", "TEXT")`. Beside img2dataset's tars lie parquet files without images: those are
    passed over, and its counts are compared with what the tars hold.

    Attributes:
      images: a member's extension or a parquet's column: the encoded image, or Hugging Face's {bytes, path}.
      caption: a member's extension, a field of the member `json`, or a column.
      score: field or column with the similarity of image and text.
      max_characters: longer captions are left out.
      max_member_bytes: larger members of a tar are left out.
      record_bytes: see `read_samples`.
    """

    images: tuple[str, ...] = IMAGES
    caption: tuple[str, ...] = CAPTIONS
    score: str = "similarity"
    max_characters: int = MAX_CHARACTERS
    max_member_bytes: int = MAX_IMAGE_BYTES
    record_bytes: int = RECORD_BYTES

    def __post_init__(self):
        _names("ImageText.images", self.images)
        _names("ImageText.caption", self.caption)

    def shards(self, path: str) -> list[str]:
        found = find_shards(path, (*TARS, "*.parquet"), "image-text pairs in tars or parquet files")
        tars = {shard.removesuffix(".tar") for shard in found if shard.endswith(".tar")}
        shards = [shard for shard in found if shard.removesuffix(".parquet") not in tars]
        if all(shard.endswith(".parquet") for shard in shards):
            self._check_columns(shards[0])  # else the run would end with nothing but rejects
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
            yield from _compare_count(Path(f"{shard.removesuffix('.tar')}_stats.json"), name, samples)

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
            # A caption may have been in the broken JSON: that is then what is wrong.
            yield (broken if broken and skip.reason == "no_text" else skip).reject(key)
            return
        if broken:  # the image's score or the better caption is lost, not the pair
            yield broken.reject(f"{key}.json", whole=False)
        yield _pair(key, RawImage(data, _score(fields.get(self.score))), caption)

    def _caption(self, get: Callable[[str], Any]) -> str:
        for name in self.caption:
            value = get(name)
            options = value if isinstance(value, list) else [value]
            for option in options:
                if isinstance(option, str) and (text := clean_text(option, self.max_characters)):
                    return text
        raise Skip("no_text", f"none of {', '.join(self.caption)} holds a text")

    # ------------------------------------------------------------ parquet

    def _columns(self, file: Any) -> tuple[str, list[str]]:
        """The image's column, and the others that are read."""
        types = {field.name: str(field.type) for field in file.schema_arrow}
        names = list(types)
        binary = ("binary", "large_binary", "fixed_size_binary", "struct")  # a column of paths or addresses is none
        image = next((name for name in self.images if types.get(name, "").startswith(binary)), "")
        captions = [name for name in self.caption if name in names]
        if not image or not captions:
            raise Skip(
                "no_column",
                f"columns {_listed(names)}; expected an image's bytes in one of {', '.join(self.images)} and a text "
                f"in one of {', '.join(self.caption)}: name yours in the settings images and caption",
            )
        return image, captions + [self.score] * (self.score in names and self.score not in captions)

    def _check_columns(self, shard: str) -> None:
        try:
            with _open_parquet(shard) as file:
                self._columns(file)
        except Skip as skip:
            if skip.reason == "no_column":
                raise UserError(f"{shard}: {skip.detail}") from skip

    def _read_parquet(self, shard: str) -> Iterator[RawDocument | Reject]:
        name = shard_name(shard)
        row = 0
        try:
            with _open_parquet(shard) as file:
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
            return Reject(key, "no_image", f"column {image} holds no bytes")
        if len(value) > self.max_member_bytes:
            return Reject(key, "image_too_large", f"{len(value)} bytes; at most {self.max_member_bytes} are read")
        try:
            return _pair(key, RawImage(value, _score(record.get(self.score))), self._caption(record.get))
        except Skip as skip:
            return skip.reject(key)


def _open_parquet(shard: str) -> Any:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UserError(f"{shard}: reading parquet needs pyarrow; pip install pyarrow") from error
    try:
        return parquet.ParquetFile(shard, buffer_size=1 << 20, page_checksum_verification=True)
    except (OSError, pyarrow.ArrowException) as error:
        raise Skip("cut_shard", f"{shard_name(shard)} is no whole parquet file ({_one_line(error)})") from error


def _batches(file: Any, columns: list[str]) -> Iterator[Any]:
    import pyarrow

    try:
        yield from file.iter_batches(ROWS, columns=columns, use_threads=False)
    except (OSError, pyarrow.ArrowException) as error:
        raise Skip("cut_shard", f"the file cannot be read on ({_one_line(error)})") from error


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
    """img2dataset counts what it wrote: a tar with fewer samples lost some and still ends well."""
    if not stats.is_file():
        return
    try:
        told = parse_json(stats.read_bytes())
        told = told.get("successes", "no") if isinstance(told, dict) else "no"
    except Skip:
        told = "no readable"
    if told != samples:
        detail = f"{samples} samples; {stats.name} tells of {told} successes"
        yield Reject(name, "count_differs", detail, whole=False)


@dataclasses.dataclass(frozen=True)
class Coco:
    """COCO's captions: a JSON of `images` and `annotations`, read whole (COCO's have 90 MB), and a folder of images.

    An image gives one document, whatever the number of its captions: `prepare` keeps an image once.

    Attributes:
      images: the images' folder, relative to the JSON's; "" looks for the last word of `captions_train2017.json`
        beside the JSON and beside its folder, as COCO is laid out, and else takes the JSON's own folder.
      captions: "first" takes an image's first caption, "all" joins them, a line each.
      max_characters: longer captions are left out.
    """

    images: str = ""
    captions: str = "first"
    max_characters: int = MAX_CHARACTERS

    def __post_init__(self):
        if self.captions not in ("first", "all"):
            raise UserError(f"Coco.captions={self.captions!r}; choose first or all")

    def shards(self, path: str) -> list[str]:
        shards = find_shards(path, ("captions_*.json",), "COCO's captions, as annotations/captions_train2017.json")
        check_folder("Coco.images", shards, self.images)
        return shards

    def read(self, shard: str) -> Iterator[RawDocument | Reject]:
        name = shard_name(shard)
        try:
            data = parse_json(Path(shard).read_bytes())
            images, captions = _by_image(data)
        except OSError as error:
            raise UserError(f"{shard}: cannot be read ({error.strerror}); expected COCO's captions") from error
        except Skip as skip:
            yield skip.reject(name)
            return
        folder = self._folder(Path(shard))
        seen = set()
        for place, image in enumerate(images):
            number = image.get("id") if isinstance(image, dict) else None
            if not isinstance(number, int | str):
                yield Reject(f"{name}/#{place}", "no_id", f"an image without an id: {json.dumps(image)[:80]}")
                continue
            key = f"{name}/{number}"
            if number in seen:
                yield Reject(key, "repeated_key", "an image of this id stands earlier in the file")
                continue
            seen.add(number)
            try:
                text = self._caption(captions.get(number, []))
                yield _pair(key, RawImage(read_image(folder, image.get("file_name"))), text)
            except Skip as skip:
                yield skip.reject(key)
        for number in (number for number in captions if number not in seen):
            yield Reject(f"{name}/{number}", "missing_image", "annotations of an image that is not in the file")

    def _caption(self, captions: list[object]) -> str:
        texts = [caption for caption in captions if isinstance(caption, str) and caption.strip("\0 \t\r\n")]
        text = clean_text(
            "\n".join(text.strip() for text in texts[: 1 if self.captions == "first" else None]), self.max_characters
        )
        if not text:
            raise Skip("no_text", f"{len(captions)} captions, none with a text")
        return text

    def _folder(self, file: Path) -> Path:
        if self.images:
            return file.parent / self.images
        last = file.stem.rpartition("_")[2]
        return next((f for f in (file.parent / last, file.parent.parent / last) if f.is_dir()), file.parent)


def _by_image(data: object) -> tuple[list[Any], dict[Any, list[Any]]]:
    """COCO's JSON -> its images, and captions by the image's id."""
    images, annotations = (data.get(part) if isinstance(data, dict) else None for part in ("images", "annotations"))
    if not isinstance(images, list) or not isinstance(annotations, list):
        raise Skip("not_coco", "expected an object with the lists images and annotations")
    captions: dict[Any, list[Any]] = {}
    for annotation in annotations:
        if isinstance(annotation, dict) and isinstance(number := annotation.get("image_id"), int | str):
            captions.setdefault(number, []).append(annotation.get("caption"))
    return images, captions
