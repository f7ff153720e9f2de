"""The Grain pipeline: source -> shuffle -> documents -> tokens -> packed rows -> batches of fixed shape.

In: `config.data`, a tokenizer and what the model expects of a picture. Out: an endless iterator of dicts with the
fields of `models.emu.Batch`, the same for the same seed, whose state is saved and restored with the model.

    indices ─ shuffle, repeat ─ documents ─ tokens ─ window of `packing_window` records ─ pack ─ rows ─ batch
             (a MapDataset: any position of the stream can be computed alone)            (state: window, row in it)
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import grain
import numpy as np
from absl import flags

from emu_jax.data.packing import TokenizedDocument, batch_metrics, build_row, pack_window, tokenize_document
from emu_jax.data.sources import PairOrder, Source, open_source
from emu_jax.data.tokenizer import Tokenizer
from emu_jax.errors import UserError, check_fields


class Stream(Protocol):
    """An endless iterator of batches whose position can be taken and given back."""

    def __next__(self) -> dict[str, np.ndarray]: ...

    def describe(self, batch: dict[str, np.ndarray]) -> dict[str, float]:
        """What is worth logging of a batch: counts of pictures and tokens, shares."""
        ...

    def get_state(self) -> dict[str, Any]: ...

    def set_state(self, state: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """`config.data`.

    Attributes:
      source, split: `fluent_emoji` and one of its splits, or a .jsonl file (its split is not read).
      row_tokens, row_images, batch_rows: S, I and B of a batch, over all hosts.
      packing_window: records that are packed together; more fill rows better and cost memory.
      workers: processes that prepare rows; 0 is one thread. Another number gives another stream.
    """

    source: str
    split: str
    seed: int
    row_tokens: int
    row_images: int
    batch_rows: int
    packing_window: int
    workers: int
    pairs: PairOrder

    def __post_init__(self):
        for name in ("row_tokens", "row_images", "batch_rows", "packing_window"):
            if getattr(self, name) < 1:
                raise UserError(f"config.data.{name}={getattr(self, name)}; expected at least 1")

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> DataConfig:
        check_fields(cls, "config.data", fields)
        check_fields(PairOrder, "config.data.pairs", fields["pairs"])
        return cls(**(dict(fields) | {"pairs": PairOrder(**dict(fields["pairs"]))}))


class _Documents:
    """Grain transform: record index -> its tokenized documents."""

    def __init__(self, source: Source, tokenizer: Tokenizer, data: DataConfig, queries: int):
        self._source, self._tokenizer, self._data, self._queries = source, tokenizer, data, queries

    def __call__(self, index: int, rng: np.random.Generator) -> list[TokenizedDocument]:
        return [
            piece
            for document in self._source.documents(int(index), rng)
            for piece in tokenize_document(
                document,
                self._tokenizer,
                queries=self._queries,
                row_tokens=self._data.row_tokens,
                row_images=self._data.row_images,
            )
        ]


class _Rows:
    """Grain transform: a window of records' documents -> packed rows, in an order that hides their fullness."""

    max_fan_out = 1_000_000  # asked for by Grain; a window never gives more rows than documents

    def __init__(self, data: DataConfig, image_size: int, pad_id: int):
        self._data, self._image_size, self._pad_id = data, image_size, pad_id

    def pack(self, window: list[list[TokenizedDocument]], rng: np.random.Generator) -> list[dict[str, np.ndarray]]:
        documents = [piece for record in window for piece in record]
        packed = pack_window(documents, self._data.row_tokens, self._data.row_images)
        return [
            build_row(
                packed[row],
                row_tokens=self._data.row_tokens,
                row_images=self._data.row_images,
                image_size=self._image_size,
                pad_id=self._pad_id,
            )
            for row in rng.permutation(len(packed))
        ]

    def flat_map(self, rows: list[dict[str, np.ndarray]]) -> list[dict[str, np.ndarray]]:
        return rows


class Pipeline:
    """An iterator of batches whose state can be taken and given back.

    Args:
      data: `config.data`.
      tokenizer: its vocabulary is the model's.
      queries, image_size: Q and pixels of a side, as the model reads pictures.
      process_index, process_count: this host's share of records and rows.
    """

    def __init__(
        self,
        data: DataConfig,
        tokenizer: Tokenizer,
        *,
        queries: int,
        image_size: int,
        process_index: int = 0,
        process_count: int = 1,
    ):
        source = open_source(data.source, data.split, image_size, data.pairs)
        if data.batch_rows % process_count:
            raise UserError(f"config.data.batch_rows={data.batch_rows} does not divide over {process_count} hosts")
        if len(source) < process_count * data.packing_window:
            data = dataclasses.replace(data, packing_window=max(1, len(source) // process_count))
        self.fingerprint = _fingerprint(data, source, tokenizer, queries, image_size, process_count)
        rows = _Rows(data, image_size, tokenizer.pad_id)
        records = (
            grain.MapDataset.range(len(source))
            .seed(data.seed)[process_index::process_count]
            .shuffle()
            .repeat()
            .random_map(_Documents(source, tokenizer, data, queries))
            .batch(data.packing_window, drop_remainder=True, batch_fn=list)
            .random_map(rows.pack)
        )
        # One thread reads ahead by two windows: enough to hide the packing, little enough to forget.
        stream = records.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2))
        stream = grain.experimental.FlatMapIterDataset(stream, rows)
        if data.workers:
            if not flags.FLAGS.is_parsed():  # Grain's worker processes read absl flags
                flags.FLAGS.mark_as_parsed()
            stream = stream.mp_prefetch(grain.multiprocessing.MultiprocessingOptions(num_workers=data.workers))
        # Batching comes after the processes: a batch never depends on how many rows a worker has left.
        self._stream = stream.batch(data.batch_rows // process_count, drop_remainder=True)
        self._iterator = iter(self._stream)
        self.split_documents = 0  # cuts through over-long documents so far

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        batch = next(self._iterator)
        self.split_documents += int(batch.pop("splits").sum())
        return batch

    def describe(self, batch: dict[str, np.ndarray]) -> dict[str, float]:
        """Counts and shares of a batch, and how many documents were cut so far."""
        return batch_metrics(batch) | {"split_documents": self.split_documents}

    def close(self) -> None:
        """Stops the threads and processes that read ahead."""
        self._iterator.close()

    def get_state(self) -> dict[str, Any]:
        """JSON-serialisable: where the stream stands, and a fingerprint of what it is."""
        return {
            "fingerprint": self.fingerprint,
            "iterator": self._iterator.get_state(),
            "split_documents": self.split_documents,
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continues exactly behind the batch after which the state was taken."""
        check_fingerprint(self.fingerprint, state["fingerprint"])
        self._iterator.set_state(state["iterator"])
        self.split_documents = state["split_documents"]


def check_fingerprint(own: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Raises unless a saved state is of the same stream: Grain itself accepts one of another seed without a word."""
    for name, value in own.items():
        if saved.get(name) != value:
            raise UserError(
                f"input pipeline: the checkpoint was taken with {name}={saved.get(name)}, this run has {name}={value}; "
                "use the same config.data, or a new work directory"
            )


def _fingerprint(
    data: DataConfig, source: Source, tokenizer: Tokenizer, queries: int, image_size: int, hosts: int
) -> dict[str, Any]:
    """Everything that decides which batch comes when, by name."""
    fields = dataclasses.asdict(data)
    return json.loads(
        json.dumps(
            fields
            | {
                "records": source.fingerprint,
                "tokenizer": tokenizer.fingerprint,
                "queries": queries,
                "image_size": image_size,
                "hosts": hosts,
            }
        )
    )


def train_tokenizer(data: DataConfig, image_size: int, *, vocab_size: int, model_type: str) -> Tokenizer:
    """A tokenizer from the source's own texts, each counted once."""
    texts = open_source(data.source, data.split, image_size, data.pairs).texts()
    return Tokenizer.train(list(dict.fromkeys(texts)), vocab_size=vocab_size, model_type=model_type)
