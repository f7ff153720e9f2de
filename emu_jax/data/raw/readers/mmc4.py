"""MMC4: JSON lines of sentences and images, each image matched with one sentence -> web documents.

    docs_no_face_shard_0_v2.jsonl, images/d.jpg ─ Mmc4 ─ Text("A cat."), RawImage(…, 0.4), Text("A dog.")

    {"text_list": ["A cat.", "A dog."],
     "image_info": [{"image_name": "d.jpg", "matched_text_index": 1, "matched_sim": 0.4}]}

Shards are read as published, in a .zip. An image comes before its sentence; every sentence is a part of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np

from emu_jax.data.clip_scores import load_scorer, match
from emu_jax.data.document import Text
from emu_jax.data.raw.files import Skip, clean_text, find_shards
from emu_jax.data.raw.image_files import ImageFiles, beside, check_beside
from emu_jax.data.raw.reader import RawDocument, RawImage, Reject
from emu_jax.data.raw.rows import LINE_PATTERNS, read_rows, without_twins
from emu_jax.data.raw.web import Found, check_similarity, embed_found, finish, low_similarity

MAX_SENTENCE = 100_000  # characters


@dataclasses.dataclass(frozen=True)
class Mmc4:
    """One document per line.

    Attributes:
      images: folder or plain .tar of the images, by `image_name`. A relative path starts at the shard's folder;
        `{shard}` stands for the shard's name, as in `{shard}.tar`.
      min_similarity: images with less CLIP similarity to their sentence are left out.
      clip: folder of CLIP weights, for records without similarities.
    """

    about: ClassVar[str] = "web documents: MMC4's JSONL and images"
    kind: ClassVar[str] = "web"
    images: str = "images"
    min_similarity: float = 0.32
    clip: str = ""

    def __post_init__(self) -> None:
        check_similarity("Mmc4", self.min_similarity)

    def shards(self, path: str) -> list[str]:
        expected = "MMC4's docs_no_face_shard_0_v2.jsonl, plain or in a .zip"
        shards = without_twins(find_shards(path, LINE_PATTERNS, expected))
        check_beside("Mmc4.images", shards, self.images)
        return shards

    def read(self, shard: str) -> Iterator[RawDocument | Reject]:
        with ImageFiles(beside(shard, self.images)) as images:
            yield from images.faults(shard)
            for row in read_rows(shard):
                if isinstance(row, Reject):
                    yield row
                else:
                    yield from self._document(*row, images)

    def _document(self, key: str, record: dict[str, Any], images: ImageFiles) -> Iterator[RawDocument | Reject]:
        texts, infos = record.get("text_list"), record.get("image_info")
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            yield Reject(key, "unreadable_record", "text_list is not a list of texts")
            return
        if not isinstance(infos, list) or not all(isinstance(info, dict) for info in infos):
            yield Reject(key, "unreadable_record", "image_info is not a list of objects")
            return
        try:
            texts = [clean_text(text, MAX_SENTENCE) for text in texts]
        except Skip as skip:
            yield skip.reject(key)
            return
        before: dict[int, list[Found]] = {}
        matches = self._matches(record.get("similarity_matrix"), infos, len(texts))
        unscored: list[Found] = []
        for number, (info, (place, score)) in enumerate(zip(infos, matches, strict=True)):
            name = f"{key}#{number}"
            if place is not None and not 0 <= place < len(texts):
                yield Reject(name, "no_sentence", f"matched_text_index={place} of {len(texts)} texts", whole=False)
                continue
            known = None if place is None or score is None else (place, score)
            if known is None and not self.clip:
                detail = "the record has no similarity; name a folder of CLIP weights as `clip`"
                yield Reject(name, "no_similarity", detail, whole=False)
                continue
            if known is not None and not known[1] >= self.min_similarity:
                yield low_similarity(key, number, known[1], self.min_similarity)
                continue
            try:
                data = images.read(info.get("image_name"))
            except Skip as skip:
                yield skip.reject(name, whole=False)
                continue
            found = Found(number, RawImage(data, score))
            if known is not None:
                before.setdefault(known[0], []).append(found)
            else:
                unscored.append(found)
        if unscored:
            places = [place for place, _ in matches]
            for part in self._score(key, texts, unscored, places):
                if isinstance(part, Reject):
                    yield part
                else:
                    place, found = part
                    before.setdefault(place, []).append(found)
        parts: list[Text | Found] = []
        for place, text in enumerate(texts):
            parts += sorted(before.get(place, ()), key=lambda found: found.number)
            if text:
                parts.append(Text(text))
        yield from finish(key, parts)

    @staticmethod
    def _matches(matrix: Any, infos: list[dict[str, Any]], texts: int) -> list[tuple[int | None, float | None]]:
        """Each image's sentence and similarity; None for what the record does not state."""
        places = [_index(info.get("matched_text_index")) for info in infos]
        scores = [_number(info.get("matched_sim")) for info in infos]
        if None in places or None in scores:
            similarity = _matrix(matrix, (len(infos), texts))
            if similarity is not None:
                best = match(similarity)
                for number, place in enumerate(places):
                    if place is None:
                        place = places[number] = int(best[number])
                        scores[number] = None
                    if scores[number] is None and 0 <= place < texts:
                        scores[number] = float(similarity[number, place])
        return list(zip(places, scores, strict=True))

    def _score(
        self, key: str, texts: list[str], images: list[Found], places: list[int | None]
    ) -> Iterator[tuple[int, Found] | Reject]:
        """Images without similarities: scored by CLIP, and matched with a sentence if the record names none."""
        good, vectors, bad = embed_found(images, key, self.clip)
        yield from bad
        if not good or not texts:
            return
        similarity = vectors @ load_scorer(self.clip).embed_texts(texts).T
        best = match(similarity)
        for row, found in enumerate(good):
            place = places[found.number]
            place = int(best[row]) if place is None else place
            score = float(similarity[row, place])
            if score >= self.min_similarity:
                yield place, Found(found.number, RawImage(found.image.data, score))
            else:
                yield low_similarity(key, found.number, score, self.min_similarity)


def _number(value: Any) -> float | None:
    try:
        return None if isinstance(value, bool | str) else float(value)
    except (TypeError, OverflowError):
        return None


def _index(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _matrix(value: Any, shape: tuple[int, int]) -> np.ndarray | None:
    """Similarities [images, sentences]; None if the record has none of that shape."""
    try:
        matrix = np.array(value, np.float64)
    except (TypeError, ValueError, OverflowError):  # ragged, or not numbers
        return None
    return matrix if matrix.shape == shape and matrix.size and np.isfinite(matrix).all() else None


READER = Mmc4
