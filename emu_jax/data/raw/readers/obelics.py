"""OBELICS: rows of two parallel lists, one of images and one of texts -> web documents.

    {"images": [null, "https://a.example/cat.jpg", null], "texts": ["Cats", null, "asleep"]}
                                    ─ Obelics ─ Text("Cats"), RawImage, Text("asleep")

Rows are Parquet, JSON lines or a JSON array. An image is a URL, which `names` maps to a file name; a file name; its
bytes, on their own or as {"bytes": …, "path": …}; or a data: URL.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from emu_jax.data.document import Text
from emu_jax.data.raw.files import Skip, clean_text, find_shards
from emu_jax.data.raw.image_files import ImageFiles, beside, check_beside, data_address
from emu_jax.data.raw.reader import RawDocument, RawImage, Reject
from emu_jax.data.raw.rows import PATTERNS, read_rows, without_twins
from emu_jax.data.raw.web import Found, check_similarity, finish
from emu_jax.errors import UserError

MAX_TEXT = 10_000_000  # characters


@dataclasses.dataclass(frozen=True)
class Obelics:
    """One document per row.

    Attributes:
      images: folder or plain .tar of the images; "" if rows hold bytes. A relative path starts at the shard's folder;
        `{shard}` stands for the shard's name.
      names: JSON object that maps an image's URL to its name in `images`, with a path like that of `images`; "" if rows
        hold names. It is kept in memory.
      image_column, text_column: the columns of images and of texts.
      clip: folder of CLIP weights, to leave out images whose similarity to the text after them is less than
        `min_similarity`; "" keeps all.
    """

    about: ClassVar[str] = "web documents: lists of texts and images, as OBELICS's"
    kind: ClassVar[str] = "web"
    images: str = ""
    names: str = ""
    image_column: str = "images"
    text_column: str = "texts"
    clip: str = ""
    min_similarity: float = 0.32

    def __post_init__(self) -> None:
        check_similarity("Obelics", self.min_similarity)

    def shards(self, path: str) -> list[str]:
        alone = not self.images and not self.names
        shards = without_twins(
            find_shards(path, PATTERNS, "OBELICS-like rows in .parquet, .jsonl or .json", alone=alone)
        )
        named = {str(beside(shard, self.names)) for shard in shards} if self.names else set()
        shards = [shard for shard in shards if str(Path(shard)) not in named]
        if self.images:
            check_beside("Obelics.images", shards, self.images)
        for name in sorted(named):
            if not Path(name).is_file():
                raise UserError(
                    f"Obelics.names={self.names!r}: no file {name}; expected a JSON object, address to name"
                )
        return shards

    def read(self, shard: str) -> Iterator[RawDocument | Reject]:
        names = self._names(shard)
        if not self.images:
            yield from self._documents(shard, names, None)
            return
        with ImageFiles(beside(shard, self.images)) as images:
            yield from images.faults(shard)
            yield from self._documents(shard, names, images)

    def _names(self, shard: str) -> Mapping[str, str]:
        if not self.names:
            return {}
        path = beside(shard, self.names)
        try:
            names = json.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read ({error}); expected a JSON object, address to name") from error
        if not isinstance(names, dict):
            raise UserError(f"{path}: holds a {type(names).__name__}; expected a JSON object, address to name")
        return names

    def _documents(
        self, shard: str, names: Mapping[str, str], images: ImageFiles | None
    ) -> Iterator[RawDocument | Reject]:
        for row in read_rows(shard):
            if isinstance(row, Reject):
                yield row
            else:
                yield from self._document(*row, names, images)

    def _document(
        self, key: str, row: dict[str, Any], names: Mapping[str, str], images: ImageFiles | None
    ) -> Iterator[RawDocument | Reject]:
        cells, texts = row.get(self.image_column), row.get(self.text_column)
        if not isinstance(cells, list) or not isinstance(texts, list):
            column = self.text_column if isinstance(cells, list) else self.image_column
            yield Reject(key, "unreadable_record", f"{column} is not a list")
            return
        if len(cells) != len(texts):
            yield Reject(key, "unreadable_record", f"{len(cells)} {self.image_column}, {len(texts)} {self.text_column}")
            return
        parts: list[Text | Found] = []
        number = 0
        for cell, text in zip(cells, texts, strict=True):
            try:
                if cell is not None:
                    number += 1
                    parts.append(Found(number - 1, RawImage(_image(cell, names, images))))
            except Skip as skip:
                yield skip.reject(f"{key}#{number - 1}", whole=False)
            if text is None:
                continue
            if not isinstance(text, str):
                yield Reject(key, "unreadable_record", f"a {type(text).__name__} among {self.text_column}")
                return
            try:
                if text := clean_text(text, MAX_TEXT):
                    parts.append(Text(text))
            except Skip as skip:
                yield skip.reject(key)
                return
        yield from finish(key, parts, clip=self.clip, least=self.min_similarity)


def _image(cell: Any, names: Mapping[str, str], images: ImageFiles | None) -> bytes:
    """A cell's image, encoded.

    Raises:
      Skip: it is not available.
    """
    if isinstance(cell, dict):
        cell = cell.get("bytes") or cell.get("path")
    if isinstance(cell, bytes) and cell:
        return cell
    if not isinstance(cell, str):
        raise Skip("missing_image", f"neither bytes nor a name: {type(cell).__name__}")
    if cell.startswith("data:"):
        return data_address(cell)
    name = names.get(cell, cell)
    if isinstance(name, str) and "://" in name:
        raise Skip("missing_image", f"{cell[:200]} is not available; `names` has no file for it")
    if images is None:
        raise Skip("missing_image", f"{cell[:200]}: `images` names no folder or tar")
    return images.read(name)


READER = Obelics
