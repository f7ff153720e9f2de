"""OBELICS: rows of two parallel lists, of which one holds a picture and the other a text -> web documents.

    {"images": [null, "https://a.example/cat.jpg", null], "texts": ["Cats", null, "asleep"]}
                                    ─ Obelics ─ Text("Cats"), RawImage, Text("asleep")

Rows are Parquet, JSON lines or a JSON array. A picture is an address, which `names` turns into a file's name; a file's
name; its bytes, alone or as {"bytes": …, "path": …}; or a data: address.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from emu_jax.data.document import Text
from emu_jax.data.raw.files import Skip, clean_text, find_shards, shard_name
from emu_jax.data.raw.pictures import Pictures, beside, check_beside, data_address
from emu_jax.data.raw.reader import RawDocument, RawImage, Reject
from emu_jax.data.raw.rows import PATTERNS, read_rows, without_twins
from emu_jax.data.raw.web import Found, check_similarity, finish
from emu_jax.errors import UserError

MAX_TEXT = 10_000_000  # characters


@dataclasses.dataclass(frozen=True)
class Obelics:
    """OBELICS-like documents.

    Attributes:
      pictures: a folder or a plain .tar of the pictures; "" where rows hold bytes. A relative path starts at the
        shard's folder, `{shard}` stands for the shard's name.
      names: a JSON object from a picture's address to its name in `pictures`, found likewise; "" where rows hold
        names. It is kept in memory.
      images, texts: the two columns.
      clip: a folder of CLIP weights: keeps the pictures whose similarity to the text behind them is at least
        `min_similarity`; "" keeps all.
    """

    pictures: str = ""
    names: str = ""
    images: str = "images"
    texts: str = "texts"
    clip: str = ""
    min_similarity: float = 0.32

    def __post_init__(self) -> None:
        check_similarity("Obelics", self.min_similarity)

    def shards(self, path: str) -> list[str]:
        shards = without_twins(find_shards(path, PATTERNS, "OBELICS-like rows in .parquet, .jsonl or .json"))
        named = {str(beside(shard, self.names)) for shard in shards} if self.names else set()
        shards = [shard for shard in shards if str(Path(shard)) not in named]
        if self.pictures:
            check_beside("Obelics.pictures", shards, self.pictures)
        for name in sorted(named):
            if not Path(name).is_file():
                raise UserError(
                    f"Obelics.names={self.names!r}: no file {name}; expected a JSON object, address to name"
                )
        return shards

    def read(self, shard: str) -> Iterator[RawDocument | Reject]:
        names = self._names(shard)
        if not self.pictures:
            yield from self._documents(shard, names, None)
            return
        with Pictures(beside(shard, self.pictures)) as pictures:
            if pictures.cut:
                yield Reject(f"{shard_name(shard)}#pictures", "cut_shard", pictures.cut, whole=False)
            yield from self._documents(shard, names, pictures)

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
        self, shard: str, names: Mapping[str, str], pictures: Pictures | None
    ) -> Iterator[RawDocument | Reject]:
        for row in read_rows(shard):
            if isinstance(row, Reject):
                yield row
            else:
                yield from self._document(*row, names, pictures)

    def _document(
        self, key: str, row: dict[str, Any], names: Mapping[str, str], pictures: Pictures | None
    ) -> Iterator[RawDocument | Reject]:
        images, texts = row.get(self.images), row.get(self.texts)
        if not isinstance(images, list) or not isinstance(texts, list):
            column = self.texts if isinstance(images, list) else self.images
            yield Reject(key, "unreadable_record", f"{column} is no list")
            return
        if len(images) != len(texts):
            yield Reject(key, "unreadable_record", f"{len(images)} {self.images}, {len(texts)} {self.texts}")
            return
        parts: list[Text | Found] = []
        number = 0
        for image, text in zip(images, texts, strict=True):
            try:
                if image is not None:
                    number += 1
                    parts.append(Found(number - 1, RawImage(_picture(image, names, pictures))))
            except Skip as skip:
                yield skip.reject(f"{key}#{number - 1}", whole=False)
            if text is None:
                continue
            if not isinstance(text, str):
                yield Reject(key, "unreadable_record", f"a {type(text).__name__} among {self.texts}")
                return
            try:
                if text := clean_text(text, MAX_TEXT):
                    parts.append(Text(text))
            except Skip as skip:
                yield skip.reject(key)
                return
        yield from finish(key, parts, clip=self.clip, least=self.min_similarity)


def _picture(image: Any, names: Mapping[str, str], pictures: Pictures | None) -> bytes:
    """A cell's picture. Raises Skip where it is not at hand."""
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path")
    if isinstance(image, bytes) and image:
        return image
    if not isinstance(image, str):
        raise Skip("missing_picture", f"neither bytes nor a name: {type(image).__name__}")
    if image.startswith("data:"):
        return data_address(image)
    name = names.get(image, image)
    if isinstance(name, str) and "://" in name:
        raise Skip("missing_picture", f"{image[:200]} is not at hand; `names` has no file for it")
    if pictures is None:
        raise Skip("missing_picture", f"{image[:200]}: no folder or tar of `pictures` is set")
    return pictures.read(name)
