"""Where a run's documents come from: prepared folders, the embedded images, or a JSONL file of pairs and documents.

A source is random access (`len`, `source.read(indices) -> records`). It turns a record into documents with a generator
that depends only on the seed and the position in the stream, so any position can be computed again.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np

from emu_jax.data import embedded_chats, fluent_emoji
from emu_jax.data.document import Document, Image, Text
from emu_jax.data.frames import EIGHT_AT_RANDOM, FrameSampling
from emu_jax.data.images import EncodedImage, ImageError, ImageFile, read_file
from emu_jax.data.jsonl import SUFFIXES, JsonlRecord, image_path, read_documents, read_unpacked
from emu_jax.data.kinds import KINDS
from emu_jax.data.prepared import Record, Records, StoredImage
from emu_jax.data.record_files import THREADS
from emu_jax.errors import UserError
from emu_jax.storage import FileInfo, Path, as_path, file_info, is_bucket, list_files

# MMC4's two sequences of a web document (from one set of notes on the paper).
FIRST_IMAGES, FIRST_TOKENS = 5, 1024
RANDOM_IMAGES, RANDOM_TOKENS = 5, 512
TOGETHER = 1024  # records that are read at the same time, where all of them are read
ORDERS = ("image_first", "text_first", "random", "both")


@dataclasses.dataclass(frozen=True)
class PairOrder:
    """Whether an image comes before or after its text, and what is learnt in each order.

    Attributes:
      order: image_first (captioning), text_first (drawing), random (the paper's pretraining), or both: every
        image gives an image-first document and, with probability `text_first_probability`, also a text-first one. The
        two share the image's encoding.
      image_first_probability: probability of image_first when the order is random (0.5 is inferred).
      text_first_text_weight: weight of the text loss in text-first documents.
      image_first_visual_weight: weight of the regression in image-first documents.
    """

    order: str = "random"
    image_first_probability: float = 0.5
    text_first_probability: float = 0.5
    text_first_text_weight: float = 1.0
    image_first_visual_weight: float = 1.0

    def __post_init__(self):
        if self.order not in ORDERS:
            raise UserError(f"config.data.pairs.order={self.order!r}; choose one of {', '.join(ORDERS)}")
        for name in ("image_first_probability", "text_first_probability"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise UserError(f"config.data.pairs.{name}={getattr(self, name)}; expected a probability")

    def documents(self, images: Sequence[Image], text: str, rng: np.random.Generator) -> list[Document]:
        """An image, or the frames of a video, and their text -> one or two documents.

        >>> image = Image(np.zeros((4, 4, 3), np.uint8), "a.png")
        >>> (first,) = PairOrder("text_first").documents([image], "a cat", np.random.default_rng(0))
        >>> [type(part).__name__ for part in first.parts]
        ['Text', 'Image']
        """
        window = len(images) > 1  # a video
        image_first = Document((*images, Text(text)), visual_weight=self.image_first_visual_weight, window=window)
        text_first = Document((Text(text), *images), text_weight=self.text_first_text_weight, window=window)
        draw = rng.random()
        if self.order == "both":
            return [image_first, text_first] if draw < self.text_first_probability else [image_first]
        if self.order == "random":
            return [image_first] if draw < self.image_first_probability else [text_first]
        return [image_first] if self.order == "image_first" else [text_first]


class Source(Protocol):
    """What the pipeline needs from a source.

    Attributes:
      fingerprint: changes when the records do.
      images_fingerprint: changes when images do that are not in the records; "" if there are none.
      remark: a line for the start of a run about what was left out; "" if nothing is known to have been.
    """

    fingerprint: str
    images_fingerprint: str
    remark: str

    def __len__(self) -> int: ...

    def read(self, indices: Sequence[int]) -> list[Any]:
        """The records at `indices`; one call for many reads them at the same time."""
        ...

    def key(self, index: int) -> str:
        """What record `index` is called where it comes from."""
        ...

    def documents(self, record: Any, rng: np.random.Generator) -> list[Document]:
        """The documents of a record; their images have the model's size when they are read."""
        ...

    def texts(self) -> list[str]:
        """Every text, to train a tokenizer from."""
        ...


class Prepared:
    """One split of a folder of `emu-jax prepare`. An image is decoded by the process that reads its pixels.

    Args:
      keep: keep all records and decoded images in memory; for small data sets.
      fit: how images become square, one of `images.FITS`.

    Attributes:
      squashed: whether preparation has squashed the images, so that `fit` can no longer change them.
    """

    images_fingerprint = ""

    def __init__(
        self,
        records: Records,
        image_size: int,
        order: PairOrder,
        *,
        subsequences: bool = False,
        frames: FrameSampling = EIGHT_AT_RANDOM,
        keep: bool = False,
        fit: str = "squash",
    ):
        self._records, self._fit = records, fit
        self._size, self._order, self._subsequences, self._frames = image_size, order, subsequences, frames
        images = records.manifest["settings"]["images"]
        stored = images["image_size"]
        self.squashed = stored is not None and images.get("fit", "squash") == "squash"
        if stored is not None and stored < image_size:
            raise UserError(
                f"{records.folder}: its images were prepared for models that read {stored} pixels, this one reads "
                f"{image_size}; prepare it again with image_size={image_size}"
            )
        self.fingerprint = records.fingerprint
        limited = f"{records.folder}: prepared from the first {records.limit:,} records of each raw file only (--limit)"
        self.remark = limited if records.limit else ""
        self._keep = keep
        self._kept_records: dict[int, Record] = {}
        self._kept_pixels: dict[str, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self._records)

    def read(self, indices: Sequence[int]) -> list[Record]:
        if not self._keep:
            return self._records.read(indices)
        new = sorted(set(indices) - self._kept_records.keys())
        self._kept_records.update(zip(new, self._records.read(new), strict=True))
        return [self._kept_records[index] for index in indices]

    def key(self, index: int) -> str:
        return self.read([index])[0].key

    def documents(self, record: Record, rng: np.random.Generator) -> list[Document]:
        kind = KINDS[record.kind]
        stored = [number for number, part in enumerate(record.parts) if isinstance(part, StoredImage)]
        shown = self._frames.choose(stored, rng) if kind.one_video else stored
        parts: list[Text | Image] = []
        for number, part in enumerate(record.parts):
            if isinstance(part, Text):
                parts.append(part)
            elif number in shown:
                key = self._records.image_key(record, number)
                encoded = EncodedImage(part.data, self._size, record.key, self._fit)
                parts.append(Image(functools.partial(self._decode_once, key, encoded) if self._keep else encoded, key))
        if kind.either_order:
            text = " ".join(part.text for part in parts if isinstance(part, Text))
            return self._order.documents([part for part in parts if isinstance(part, Image)], text, rng)
        if kind.subsequences and self._subsequences:
            return subsequences(parts, rng)
        return [Document(tuple(parts), window=kind.window)]

    def _decode_once(self, key: str, encoded: EncodedImage) -> np.ndarray:
        if key not in self._kept_pixels:
            self._kept_pixels[key] = encoded()
        return self._kept_pixels[key]

    def texts(self) -> list[str]:
        pieces = (range(first, min(first + TOGETHER, len(self))) for first in range(0, len(self), TOGETHER))
        records = (record for piece in pieces for record in self.read(piece))
        return [part.text for record in records for part in record.parts if isinstance(part, Text)]


class Jsonl:
    """A file of documents, one JSON object per line; image paths are relative to the file, or begin by a scheme.

    {"image": "cat.png", "text": "a cat"}                                        a pair
    {"parts": [{"text": "first"}, {"image": "a.png"}, {"text": "then"}]}         an interleaved document

    Args:
      max_faults: share of the lines that may be left out because they hold no document (`jsonl.py`).
    """

    def __init__(
        self,
        path: Path,
        image_size: int,
        order: PairOrder,
        image_fingerprint: str = "stat",
        fit: str = "squash",
        max_faults: float = 0.0,
    ):
        if not path.is_file():
            raise UserError(f"config.data.source {path}: no such file; expected a JSONL of pairs or documents")
        self._path, self._size, self._order, self._fit = path, image_size, order, fit
        data = read_unpacked(path)
        self.fingerprint = hashlib.sha256(data).hexdigest()
        found = read_documents(path, data, max_faults)
        self._numbers, self._records, self.remark = [*found.records], [*found.records.values()], found.remark(path)
        named = {value for _, parts in self._records for kind, value in parts if kind == "image"}
        self._images = {name: image_path(name, path) for name in sorted(named)}
        versions = IMAGE_FINGERPRINTS[image_fingerprint](list(self._images.values()))
        self.images_fingerprint = hashlib.sha256(json.dumps([*self._images, *versions]).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._records)

    def read(self, indices: Sequence[int]) -> list[JsonlRecord]:
        return [self._records[index] for index in indices]

    def key(self, index: int) -> str:
        return f"line {self._numbers[index]}"

    def _image(self, name: str) -> Image:
        path = self._images[name]
        return Image(ImageFile(path, self._size, self._fit), str(path))

    def documents(self, record: JsonlRecord, rng: np.random.Generator) -> list[Document]:
        is_pair, parts = record
        if is_pair:
            return self._order.documents([self._image(parts[0][1])], parts[1][1], rng)
        return [Document(tuple(Text(value) if kind == "text" else self._image(value) for kind, value in parts))]

    def texts(self) -> list[str]:
        return [value for _, parts in self._records for kind, value in parts if kind == "text"]


def _stats(paths: Sequence[Path]) -> list[str]:
    """Size and time of each file's last change; in a bucket size and digest, by one listing of each folder."""
    folders = {path.parent: None for path in paths if is_bucket(path)}
    listed = {folder: list_files(folder) for folder in folders}
    return [_version(listed[path.parent].get(path.name) if is_bucket(path) else file_info(path)) for path in paths]


def _version(found: FileInfo | None) -> str:
    return MISSING if found is None else f"{found.size} {found.version}"


def _contents(paths: Sequence[Path]) -> list[str]:
    """SHA-256 of each file."""
    with ThreadPoolExecutor(THREADS) as threads:
        return list(threads.map(_digest, paths))


def _digest(path: Path) -> str:
    try:
        return hashlib.sha256(read_file(path)).hexdigest()
    except ImageError:
        return MISSING


MISSING = "missing"  # a version; when the image is drawn, it counts as a fault
IMAGE_FINGERPRINTS = {"stat": _stats, "content": _contents}  # how replaced images are recognised


def subsequences(parts: Sequence[Text | Image], rng: np.random.Generator) -> list[Document]:
    """The two sequences that the paper takes from each MMC4 document.

    The first is the document's beginning: 1,024 tokens with the first five images. The second is 512 tokens of five
    random images, each with the sentence that follows it (or the paragraph, if the page does not separate sentences).
    """
    places = [place for place, part in enumerate(parts) if isinstance(part, Image)]
    later = set(places[FIRST_IMAGES:])
    beginning = tuple(part for place, part in enumerate(parts) if place not in later)
    chosen: list[Text | Image] = []
    for place in sorted(rng.choice(places, min(RANDOM_IMAGES, len(places)), replace=False)) if places else ():
        chosen.append(parts[place])
        following = (part.text.strip() for part in parts[place + 1 :] if isinstance(part, Text))
        chosen += [Text(text.partition("\n")[0]) for text in following][:1]
    documents = [Document(beginning, max_tokens=FIRST_TOKENS)]
    return [*documents, Document(tuple(chosen), max_tokens=RANDOM_TOKENS)] if chosen else documents


def open_source(
    name: str,
    split: str,
    image_size: int,
    order: PairOrder,
    *,
    subsequences: bool = False,
    frames: FrameSampling = EIGHT_AT_RANDOM,
    image_fingerprint: str = "stat",
    fit: str = "squash",
    max_faults: float = 0.0,
) -> Source:
    """Opens an embedded source (`fluent_emoji` and so on), a .jsonl file, or a folder of `emu-jax prepare`.

    Args:
      image_fingerprint: a name in `IMAGE_FINGERPRINTS`, for the images of a .jsonl file.
      fit: how images become square, one of `images.FITS`.
      max_faults: share of the lines of a .jsonl file that may be left out because they hold no document.

    Raises:
      UserError: there is no such source or split, or its images are smaller than `image_size`.
    """
    if name == fluent_emoji.NAME:
        return Prepared(fluent_emoji.records(split), image_size, order, keep=True)
    if name == embedded_chats.NAME:
        return embedded_chats.FluentChats(split, image_size)
    if name == embedded_chats.QUESTIONS_NAME:
        return embedded_chats.FluentQuestions(split, image_size)
    path = as_path(name)
    if name.endswith(SUFFIXES):
        return Jsonl(path, image_size, order, image_fingerprint, fit, max_faults)
    if path.is_dir():
        return Prepared(Records(path, split), image_size, order, subsequences=subsequences, frames=frames, fit=fit)
    if path.is_file():
        raise UserError(
            f"config.data source {name!r}: files of this kind are not trained on as they are; turn it into records by "
            f"`emu-jax prepare`, or into a .jsonl file"
        )
    raise UserError(
        f"config.data source {name!r}: no such folder; expected a folder of `emu-jax prepare`, a .jsonl file, "
        f"{fluent_emoji.NAME}, {embedded_chats.NAME} or {embedded_chats.QUESTIONS_NAME}"
    )
