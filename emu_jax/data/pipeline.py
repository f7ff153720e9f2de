"""The Grain pipeline: source -> shuffle -> documents -> tokens -> packed rows -> batches of fixed shape.

In: `config.data`, a tokenizer and what the model expects of a picture. Out: an endless iterator of dicts with the
fields of `models.emu.Batch`, the same for the same seed, whose state is saved and restored with the model.

    indices ─ shuffle, repeat ─ documents ─ tokens ─ window of `packing_window` records ─ pack ─ rows ─ batch
             (a MapDataset: any position of the stream can be computed alone)            (state: window, row in it)

Several hosts plan the same stream: each reads and packs the texts of all rows, but decodes the pictures of those rows
of every batch alone that its devices hold. So N hosts train on the batches of one, and a state does not depend on
their number.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import grain
import numpy as np
from absl import flags

from emu_jax.data.packing import TokenizedDocument, batch_metrics, build_row, pack_window, tokenize_document
from emu_jax.data.sources import PairOrder, Source, open_source
from emu_jax.data.tokenizer import Tokenizer
from emu_jax.errors import UserError, check_fields

STREAM = 2  # counts up when the same settings begin to give other batches, or a state to say something else
DESCRIBING = ("slots", "segments", "splits")  # fields that every host builds of all rows


class Stream(Protocol):
    """An endless iterator of batches whose position can be taken and given back."""

    def __next__(self) -> dict[str, np.ndarray]: ...

    def describe(self) -> dict[str, float]:
        """What is worth logging of the newest batch, over all hosts: counts of pictures and tokens, shares."""
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
    """Grain transform: a window of records' documents -> rows of them, in an order that hides their fullness."""

    max_fan_out = 1_000_000  # asked for by Grain; a window never gives more rows than documents

    def __init__(self, data: DataConfig):
        self._data = data

    def pack(self, window: list[list[TokenizedDocument]], rng: np.random.Generator) -> list[list[TokenizedDocument]]:
        documents = [piece for record in window for piece in record]
        packed = pack_window(documents, self._data.row_tokens, self._data.row_images)
        return [packed[row] for row in rng.permutation(len(packed))]

    def flat_map(self, rows: list[list[TokenizedDocument]]) -> list[list[TokenizedDocument]]:
        return rows


Build = Callable[[list[TokenizedDocument], int], dict[str, np.ndarray]]  # a row's documents and its place in the batch

_worker = (0, 1)  # which of how many processes that prepare rows this one is


def _become_worker(index: int, count: int) -> None:
    global _worker
    _worker = (index, count)


class _BuiltRows(grain.IterDataset):
    """Rows of documents -> rows of arrays, built knowing which place of a batch of B rows they will take."""

    def __init__(self, parent: grain.IterDataset, build: Build, batch_rows: int):
        super().__init__(parent)
        self._build, self._batch_rows = build, batch_rows

    def __iter__(self) -> grain.DatasetIterator:
        return _RowBuilder(self._parent.__iter__(), self._build, self._batch_rows)


class _RowBuilder(grain.DatasetIterator):
    def __init__(self, parent: grain.DatasetIterator, build: Build, batch_rows: int):
        super().__init__(parent)
        self._build, self._batch_rows = build, batch_rows
        self._count = 0  # rows that this process has built

    def __next__(self) -> dict[str, np.ndarray]:
        documents = next(self._parent)
        worker, workers = _worker
        number = self._count * workers + worker  # Grain takes a row of every worker in turn
        self._count += 1
        return self._build(documents, number % self._batch_rows)

    def get_state(self) -> dict[str, Any]:
        return {"parent": self._parent.get_state(), "count": self._count}

    def set_state(self, state: dict[str, Any]) -> None:
        self._parent.set_state(state["parent"])
        self._count = state["count"]


class Pipeline:
    """An iterator of batches whose state can be taken and given back.

    Args:
      data: `config.data`.
      tokenizer: its vocabulary is the model's.
      queries, image_size: Q and pixels of a side, as the model reads pictures.
      own: this host's rows of every batch (`train.mesh.own_rows`); None: all.
    """

    def __init__(
        self,
        data: DataConfig,
        tokenizer: Tokenizer,
        *,
        queries: int,
        image_size: int,
        own: Sequence[int] | None = None,
    ):
        source = open_source(data.source, data.split, image_size, data.pairs)
        if len(source) < data.packing_window:
            data = dataclasses.replace(data, packing_window=len(source))
        self.fingerprint = _fingerprint(data, source, tokenizer, queries, image_size)
        places = list(range(data.batch_rows) if own is None else own)
        mine = set(places)
        sizes = {"row_tokens": data.row_tokens, "row_images": data.row_images, "image_size": image_size}

        def build(documents: list[TokenizedDocument], place: int) -> dict[str, np.ndarray]:
            return build_row(documents, **sizes, pad_id=tokenizer.pad_id, with_images=place in mine)

        def assemble(rows: list[dict[str, np.ndarray]]) -> dict[str, Any]:
            batch = {name: np.stack([rows[place][name] for place in places]) for name in rows[places[0]]}
            return batch | {"whole": {name: np.stack([row[name] for row in rows]) for name in DESCRIBING}}

        rows = _Rows(data)
        # Grain's seeds count the slice `[:]`: without it, the seeds of earlier runs would mean other streams.
        records = (
            grain.MapDataset.range(len(source))
            .seed(data.seed)[:]
            .shuffle()
            .repeat()
            .random_map(_Documents(source, tokenizer, data, queries))
            .batch(data.packing_window, drop_remainder=True, batch_fn=list)
            .random_map(rows.pack)
        )
        # One thread reads ahead by two windows: enough to hide the packing, little enough to forget.
        stream = records.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2))
        stream = _BuiltRows(grain.experimental.FlatMapIterDataset(stream, rows), build, data.batch_rows)
        if data.workers:
            if not flags.FLAGS.is_parsed():  # Grain's worker processes read absl flags
                flags.FLAGS.mark_as_parsed()
            options = grain.multiprocessing.MultiprocessingOptions(num_workers=data.workers)
            stream = stream.mp_prefetch(options, worker_init_fn=_become_worker)
        # Batching comes after the processes: a batch never depends on how many rows a worker has left.
        stream = stream.batch(data.batch_rows, drop_remainder=True, batch_fn=assemble)
        # Another thread decodes the next batch's pictures.
        self._iterator = iter(grain.experimental.ThreadPrefetchIterDataset(stream, prefetch_buffer_size=1))
        self._whole: dict[str, np.ndarray] = {}  # the newest batch's `DESCRIBING`, of all hosts
        self._row_images = data.row_images
        self.split_documents = 0  # cuts through over-long documents so far, of all hosts

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        batch = next(self._iterator)
        del batch["splits"]
        self._whole = batch.pop("whole")
        self.split_documents += int(self._whole["splits"].sum())
        return batch

    def describe(self) -> dict[str, float]:
        """Counts and shares of the newest batch, and how many documents were cut so far."""
        return batch_metrics(self._whole, self._row_images) | {"split_documents": self.split_documents}

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
    data: DataConfig, source: Source, tokenizer: Tokenizer, queries: int, image_size: int
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
                "stream": STREAM,
            }
        )
    )


def train_tokenizer(data: DataConfig, image_size: int, *, vocab_size: int, model_type: str) -> Tokenizer:
    """A tokenizer from the source's own texts, each counted once."""
    texts = open_source(data.source, data.split, image_size, data.pairs).texts()
    return Tokenizer.train(list(dict.fromkeys(texts)), vocab_size=vocab_size, model_type=model_type)
