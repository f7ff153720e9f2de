"""COCO's captions: a JSON of `images` and `annotations`, and a folder of images.

annotations/captions_*.json ─ Coco ─ RawDocument("captions_val2014.json/42", "pair", (RawImage, Text)) | Reject
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from emu_jax.data.document import Text
from emu_jax.data.raw.files import Skip, check_folder, clean_text, find_shards, parse_json, read_image, shard_name
from emu_jax.data.raw.reader import RawDocument, RawImage, Reject
from emu_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Coco:
    """One document per image, whatever the number of its captions. The JSON is read at once (COCO's have 90 MB).

    Attributes:
      images: folder of the images, relative to the JSON's. With "", the folder named by the last word of
        `captions_train2017.json` is looked for beside the JSON and beside its folder, as COCO is laid out; otherwise
        the JSON's own folder is used.
      captions: "first" takes an image's first caption, "all" joins them, one per line.
      max_characters: longer captions are left out.
    """

    about: ClassVar[str] = "images with captions: COCO's JSON"
    kind: ClassVar[str] = "pair"
    images: str = ""
    captions: str = "first"
    max_characters: int = 10_000

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
                yield Reject(key, "repeated_key", "an earlier image in the file has this id")
                continue
            seen.add(number)
            try:
                text = self._caption(captions.get(number, []))
                data = read_image(folder, image.get("file_name"))
                yield RawDocument(key, self.kind, (RawImage(data), Text(text)))
            except Skip as skip:
                yield skip.reject(key)
        for number in (number for number in captions if number not in seen):
            yield Reject(f"{name}/{number}", "missing_image", "annotations for an image that is not in the file")

    def _caption(self, captions: list[object]) -> str:
        texts = [caption for caption in captions if isinstance(caption, str) and caption.strip("\0 \t\r\n")]
        text = clean_text(
            "\n".join(text.strip() for text in texts[: 1 if self.captions == "first" else None]), self.max_characters
        )
        if not text:
            raise Skip("no_text", f"{len(captions)} captions, all without text")
        return text

    def _folder(self, file: Path) -> Path:
        if self.images:
            return file.parent / self.images
        last = file.stem.rpartition("_")[2]
        return next((f for f in (file.parent / last, file.parent.parent / last) if f.is_dir()), file.parent)


def _by_image(data: object) -> tuple[list[Any], dict[Any, list[Any]]]:
    """COCO's JSON -> its images, and their captions by image id."""
    images, annotations = (data.get(part) if isinstance(data, dict) else None for part in ("images", "annotations"))
    if not isinstance(images, list) or not isinstance(annotations, list):
        raise Skip("not_coco", "expected an object with the lists images and annotations")
    captions: dict[Any, list[Any]] = {}
    for annotation in annotations:
        if isinstance(annotation, dict) and isinstance(number := annotation.get("image_id"), int | str):
            captions.setdefault(number, []).append(annotation.get("caption"))
    return images, captions


READER = Coco
