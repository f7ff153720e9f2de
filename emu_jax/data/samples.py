"""Records -> their samples: weighted documents as sequences of at most a row; and a record's mean number of samples.

For each document, it is drawn at random whether its images are *predicted* (regression targets) or only *read* (inputs
of the text after them). If `model.stop_target_inputs` keeps gradients out of predicted images, the encoder learns from
the images that are read.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from emu_jax.data.config import DataConfig
from emu_jax.data.document import Document
from emu_jax.data.sequence import TokenizedDocument, tokenize_document
from emu_jax.data.sources import Source
from emu_jax.data.tokenizer import Tokenizer

MEASURED_RECORDS = 2048  # of a source, spread evenly over it
TOGETHER = 256  # of these, read at the same time


Place = tuple[int, int]  # (number of the source, index of the record)


class Samples:
    """Grain transform: places of records, each with its generator -> the samples of each record.

    The records of one call are read at the same time.

    Args:
      sources: the opened sources, in the order of `data.sources`.
      queries: Q, embeddings per image.
      learn_image_token: label [IMG], so that the model learns when an image comes.
    """

    def __init__(
        self,
        sources: Mapping[str, Source],
        tokenizer: Tokenizer,
        data: DataConfig,
        queries: int,
        learn_image_token: bool = False,
    ):
        self._sources, self._tokenizer, self._data = list(sources.values()), tokenizer, data
        self._entries = list(data.sources.values())
        self.lengths = {name: len(source) for name, source in sources.items()}  # records per source
        self._means: dict[tuple[str, int, int], dict[str, float]] = {}
        self._fixed: dict[str, Any] = {
            "queries": queries,
            "learn_image_token": learn_image_token,
            "chat_cut": data.chat_cut,
        }

    def __call__(self, drawn: Sequence[tuple[Place, np.random.Generator]]) -> list[list[TokenizedDocument]]:
        return self.cut(drawn, self._data.row_images)

    def cut(self, drawn: Sequence[tuple[Place, np.random.Generator]], row_images: int) -> list[list[TokenizedDocument]]:
        """The samples of each record, for rows of `row_images` images."""
        records: dict[Place, Any] = {}
        for source in sorted({source for (source, _), _ in drawn}):
            indices = sorted({index for (number, index), _ in drawn if number == source})
            read = self._sources[source].read(indices)
            records.update(zip([(source, index) for index in indices], read, strict=True))
        return [self._cut(place, records[place], rng, row_images) for place, rng in drawn]

    def _cut(self, place: Place, record: Any, rng: np.random.Generator, row_images: int) -> list[TokenizedDocument]:
        source, index = place
        entry, row_tokens = self._entries[source], self._data.row_tokens
        samples = []
        for document in self._sources[source].documents(record, rng):
            document = dataclasses.replace(
                document,
                text_weight=document.text_weight * entry.text_weight,
                visual_weight=document.visual_weight * entry.visual_weight,
            )
            document = read_or_predicted(document, self._data.predicted_share, rng)
            sizes: dict[str, Any] = {"row_tokens": row_tokens, "row_images": row_images}
            samples += tokenize_document(document, self._tokenizer, source=source, rng=rng, **sizes, **self._fixed)
        return [dataclasses.replace(sample, record=index) for sample in samples]

    def with_rows(self, data: DataConfig) -> Samples:
        """The same samples for rows of other sizes."""
        other = copy.copy(self)
        other._data = data
        return other

    def measure(self, source: int, most: int, row_images: int | None = None) -> list[list[TokenizedDocument]]:
        """The samples of up to `most` records of a source, spread evenly over it; the same on every host.

        Args:
          row_images: images of a row; None uses the config's.
        """
        row_images = row_images or self._data.row_images
        count = len(self._sources[source])
        indices = np.unique(np.linspace(0, count - 1, min(count, most)).astype(int))
        drawn = [
            ((source, index), np.random.default_rng([self._data.seed, source, index])) for index in indices.tolist()
        ]
        pieces = [drawn[first : first + TOGETHER] for first in range(0, len(drawn), TOGETHER)]
        return [samples for piece in pieces for samples in self.cut(piece, row_images)]

    def per_record(self, unit: str, row_images: int, most: int = MEASURED_RECORDS) -> dict[str, float] | None:
        """The mean number of samples, or tokens, per record of each source; None if not needed.

        Args:
          unit: `config.data.mixture_unit`; with records, or with a single source, nothing is measured.
          most: number of records to measure.
        """
        if unit == "records" or len(self.lengths) == 1:
            return None
        key = (unit, row_images, most)
        if key not in self._means:
            means = {}
            for number, name in enumerate(self.lengths):
                records = self.measure(number, most, row_images)
                counts = [len(record) if unit == "samples" else sum(map(len, record)) for record in records]
                means[name] = max(sum(counts), 1) / len(counts)
            self._means[key] = means
        return self._means[key]


def read_or_predicted(document: Document, predicted_share: float, rng: np.random.Generator) -> Document:
    """The document, with images that are predicted with probability `predicted_share` and otherwise only read.

    Images without learnt text after them stay predicted, because nothing would be learnt from reading them.
    """
    if predicted_share == 1.0 or not document.visual_weight or not document.is_read:
        return document
    return document if rng.random() < predicted_share else document.read_only()
