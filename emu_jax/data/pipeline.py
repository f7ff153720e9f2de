"""The Grain pipeline: sources -> mixture -> documents -> tokens -> packed rows -> batches of fixed shape.

In: `config.data`, a tokenizer, and the size of the model's images. Out: an iterator of dicts with the fields of
`models.emu.Batch`, which is the same for the same seed, and whose state is saved and restored with the model.

    windows of packed rows (windows.py)            ─ K shards ─ rows ─ batch
    (each can be computed without those before it)    (state: window, row in it)

Shard k reads every K-th window and fills the k-th part of every batch. A host reads the shards whose rows its devices
hold, and decodes only the images of its own rows. So batches and states depend on K but not on the number of hosts.
With K = 1 every host plans all rows. With a shard for each device that holds rows of its own, a record is read by one
host, whatever the order of the devices in the mesh; a host's four chips are not neighbours there on v5e.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import grain
import numpy as np
from absl import flags

from emu_jax.data.config import DataConfig
from emu_jax.data.counts import Counts, row_counts
from emu_jax.data.packing import CONTINUES, BuiltRow, build_row
from emu_jax.data.row_sizes import size_rows
from emu_jax.data.samples import Samples
from emu_jax.data.sequence import TokenizedDocument
from emu_jax.data.sources import Source, open_source
from emu_jax.data.tokenizer import Tokenizer
from emu_jax.data.windows import Rows, make_windows
from emu_jax.errors import EXIT_LOST, TransientError, UserError

STREAM = 6  # increases when the same settings give other batches, or when a state's meaning changes
FIELDS = ("images", "tokens", "segments", "slots", "text_weights", "visual_weights")  # of a batch; see `Pipeline`
DESCRIBED = ("slots", "segments", "source_ids", "visual_weights")  # arrays from which a batch is described
MIN_JUDGED_DOCUMENTS = 1000  # a source's share of faults is taken of at least so many documents


class Stream(Protocol):
    """An iterator of batches whose position can be saved and restored.

    Attributes:
      records: for each row of the newest batch, of those that this process reads, its documents' records: (number of
        the source, index of the record).
    """

    records: list[list[tuple[int, int]]]

    def __next__(self) -> dict[str, np.ndarray]: ...

    def counts(self) -> Counts:
        """Counts of the newest batch, such as images and tokens, by part of it."""
        ...

    def name(self, source: int, record: int) -> tuple[str, str]:
        """The name of a source, and the key of one of its records, as a person finds it again."""
        ...

    def get_state(self) -> dict[str, Any]: ...

    def set_state(self, state: Mapping[str, Any]) -> None: ...

    def resume(self, state: Mapping[str, Any], *, differing: Collection[str] = (), skip_windows: int = 0) -> int:
        """Continues at a saved state, or near it if the stream differs or leaves windows out (`Pipeline.resume`)."""
        ...

    def close(self) -> None: ...


Build = Callable[[list[TokenizedDocument], int], BuiltRow]  # (a row's documents, its index in the part) -> the row


class _Part(NamedTuple):
    """A shard's part of a batch.

    Attributes:
      arrays: the fields of the batch, for this host's rows.
      described: `DESCRIBED` and the rows' cuts, for all rows of the part.
      faults: those of all rows, as `BuiltRow` has them.
      records: those of this host's rows, as `BuiltRow` has them.
    """

    arrays: dict[str, np.ndarray]
    described: dict[str, np.ndarray]
    faults: list[tuple[int, str]]
    records: list[list[tuple[int, int]]]


class _Builder:
    """Builds a shard's rows.

    If one process builds them all, the rows of a batch share one array of images, so that they need not be copied.

    Args:
      own: the rows of the shard's part of a batch whose images this host decodes.
    """

    def __init__(self, data: DataConfig, image_size: int, pad_id: int, own: Sequence[int]):
        self._sizes = {"row_tokens": data.row_tokens, "row_images": data.row_images, "image_size": image_size}
        self._pad_id, self._numbers = pad_id, {row: number for number, row in enumerate(own)}
        self._shared = data.workers == 0
        self._images: np.ndarray | None = None

    def __call__(self, documents: list[TokenizedDocument], row: int) -> BuiltRow:
        number, images = self._numbers.get(row), None
        if self._shared and number is not None:
            if number == 0:
                size = self._sizes["image_size"]
                self._images = np.zeros((len(self._numbers), self._sizes["row_images"], size, size, 3), np.uint8)
            assert self._images is not None  # rows come in order
            images = self._images[number]
        with_images = number is not None
        return build_row(documents, **self._sizes, pad_id=self._pad_id, with_images=with_images, images=images)


def _stacked(arrays: list[np.ndarray]) -> np.ndarray:
    """Stacks arrays; returns the array that they are all the rows of, if there is one, and otherwise a copy."""
    whole = arrays[0].base
    if whole is not None and len(whole) == len(arrays) and all(array.base is whole for array in arrays):
        return whole
    return np.stack(arrays)


WORKER_LOST = "Worker process was terminated unexpectedly"  # what Grain says of a killed one

_worker = (0, 1)  # index of this process among the workers that prepare rows, and their number


def _become_worker(index: int, count: int) -> None:
    """A worker process lives as long as its parent, which also gets the signals that end a run, and may save first."""
    global _worker
    _worker = (index, count)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, name="end-with-parent", daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(EXIT_LOST)


class _BuiltRows(grain.IterDataset):
    """Rows of documents -> built rows, whose index in the batch is known in advance."""

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

    def __next__(self) -> BuiltRow:
        documents = next(self._parent)
        worker, workers = _worker
        number = self._count * workers + worker  # Grain takes rows from the workers in turn
        self._count += 1
        return self._build(documents, number % self._batch_rows)

    def get_state(self) -> dict[str, Any]:
        return {"parent": self._parent.get_state(), "count": self._count}

    def set_state(self, state: dict[str, Any]) -> None:
        self._parent.set_state(state["parent"])
        self._count = state["count"]


class _Shard:
    """One shard: an iterator of its parts of batches, whose position can be saved and restored.

    Args:
      windows: the shard's windows.
      own: the rows of the shard's part of a batch whose images this host decodes.
      fields: names of the arrays of a batch.
    """

    def __init__(
        self,
        windows: grain.MapDataset,
        data: DataConfig,
        build: Build,
        rows: Rows,
        own: list[int],
        fields: Sequence[str],
    ):
        per_batch = data.batch_rows // data.shards
        self.own, self._workers = own, data.workers

        def assemble(built: list[BuiltRow]) -> _Part:
            described = {name: np.stack([row.arrays[name] for row in built]) for name in DESCRIBED}
            return _Part(
                arrays={name: _stacked([built[row].arrays[name] for row in own]) for name in fields},
                described=described | {"cuts": np.stack([row.cuts for row in built])},
                faults=[fault for row in built for fault in row.faults],
                records=[built[row].records for row in own],
            )

        # Two windows ahead, each by its own thread: one waits for its records while the other is packed.
        stream = windows.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=2))
        stream = _BuiltRows(grain.experimental.FlatMapIterDataset(stream, rows), build, per_batch)
        if data.workers:
            if not flags.FLAGS.is_parsed():  # Grain's worker processes read absl flags
                flags.FLAGS.mark_as_parsed()
            options = grain.multiprocessing.MultiprocessingOptions(num_workers=data.workers)
            stream = stream.mp_prefetch(options, worker_init_fn=_become_worker)
        # Batches are formed after the worker processes, so that they never depend on how many rows a worker has left.
        stream = stream.batch(per_batch, drop_remainder=True, batch_fn=assemble)
        # Another thread decodes the next batch's images.
        self._iterator = iter(grain.experimental.ThreadPrefetchIterDataset(stream, prefetch_buffer_size=1))
        self.counts: collections.Counter[str] = collections.Counter()

    def __next__(self) -> _Part:
        try:
            return next(self._iterator)
        except RuntimeError as error:
            if WORKER_LOST not in str(error):
                raise
            raise TransientError(
                f"config.data.workers={self._workers}: a process that prepares batches was killed; run it again to "
                "resume; if the system's log shows that memory ran out, lower config.data.workers"
            ) from error

    def get_state(self) -> dict[str, Any]:
        return {"iterator": self._iterator.get_state(), "counts": dict(self.counts)}

    def set_state(self, state: Mapping[str, Any]) -> None:
        self._iterator.set_state(state["iterator"])
        self.counts = collections.Counter(state["counts"])

    def close(self) -> None:
        self._iterator.close()


class Pipeline:
    """An iterator of batches whose state can be saved and restored; endless unless all sources have finite epochs.

    A batch has the arrays of `FIELDS`, and `sources` if there are several sources.

    Args:
      data: `config.data`; row sizes of 0 are measured and chosen.
      tokenizer: the model's tokenizer.
      queries, image_size: Q and pixels of a side of the model's images.
      own: maps the number of rows of a batch to the indices of this host's rows, ascending; None means all rows.
      learn_image_token: label [IMG], so that the model learns when an image comes.

    Attributes:
      sources: names of the sources, by number.
      data: the config with its row sizes filled in.
      fill: how full the first rows are.
      remarks: lines about what sources leave out.
      records: those of the newest batch, see `Stream`.
    """

    def __init__(
        self,
        data: DataConfig,
        tokenizer: Tokenizer,
        *,
        queries: int,
        image_size: int,
        own: Callable[[int], list[int]] | None = None,
        learn_image_token: bool = False,
    ):
        data = dataclasses.replace(data, shards=data.shards or 1)  # 0 is resolved where the mesh is known
        sources = data.open(image_size)
        self.sources = list(sources)
        self.remarks = [source.remark for source in sources.values() if source.remark]
        self._fields = FIELDS if len(sources) == 1 else (*FIELDS, "source_ids")
        samples = Samples(sources, tokenizer, data, queries, learn_image_token)
        self.data, self.fill = size_rows(data, samples, queries)
        self.samples = samples.with_rows(self.data)
        self.fingerprint = _fingerprint(self.data, sources, tokenizer, queries, image_size, learn_image_token)
        self._tokenizer, self._image_size = tokenizer, image_size
        self._earlier: list[list[Any]] = []  # [window, weights by source]: weights that held up to that window
        self._own = list(range(self.data.batch_rows)) if own is None else own(self.data.batch_rows)
        self._parts: dict[int, _Part] = {}  # of the newest batch, by shard
        self._sources = list(sources.values())
        self.records: list[list[tuple[int, int]]] = []
        self._shards: dict[int, _Shard] = {}
        self._skipped = 0  # windows that were left out on purpose
        self._start(0)

    def _start(self, offset: int) -> None:
        """Creates the shards anew; the stream starts at window `offset`."""
        data, rows = self.data, Rows(self.data)
        windows = make_windows(self.samples, data, [(end, weights) for end, weights in self._earlier])[offset:]
        self.close()
        self._offset, self._shards = offset, {}
        for shard, own in rows_of_shards(self._own, data.batch_rows // data.shards).items():
            build = _Builder(data, self._image_size, self._tokenizer.pad_id, own)
            self._shards[shard] = _Shard(windows[shard :: data.shards], data, build, rows, own, self._fields)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        for number, shard in self._shards.items():
            self._parts[number] = part = next(shard)
            shard.counts["split_documents"] += int((part.described["cuts"] & CONTINUES).sum())
            for source, name in enumerate(self.sources):
                shard.counts[f"documents/{name}"] += _documents(part.described, source)
                shard.counts[f"faults/{name}"] += sum(fault[0] == source for fault in part.faults)
            self._check_faults(part.faults)
        parts = [self._parts[number] for number in self._shards]
        self.records = [row for part in parts for row in part.records]
        return _join([part.arrays for part in parts])

    def _check_faults(self, faults: list[tuple[int, str]]) -> None:
        """Raises if a source with a new fault has too many."""
        for source, message in faults:
            name = self.sources[source]
            found, documents = self.count(f"faults/{name}"), self.count(f"documents/{name}")
            if found > self.data.max_faults * max(documents, MIN_JUDGED_DOCUMENTS):
                raise UserError(
                    f"config.data source {name}: {found} of its first {documents} documents have unreadable images, "
                    f"more than config.data.max_faults={self.data.max_faults}; the last: {message}"
                )

    @property
    def cuts(self) -> np.ndarray:
        """The newest batch's `BuiltRow.cuts`, int32 [B, S]."""
        return np.concatenate([self._parts[number].described["cuts"] for number in self._shards])

    def count(self, name: str) -> int:
        """A count over all batches so far.

        Args:
          name: `split_documents` (cuts through documents longer than a row), `documents/<source>` or `faults/<source>`.
            Documents and cuts are counted in the shards that this host reads, faults in the rows that it decodes.
        """
        return sum(shard.counts[name] for shard in self._shards.values())

    def counts(self) -> Counts:
        """Counts of the newest batch: of whole shards, and faults of the rows that this host decodes."""
        found: dict[str, dict[str, float]] = {}
        for number, shard in self._shards.items():
            rows = self._parts[number].described
            counts = row_counts(rows, self.data.row_images)
            if len(self.sources) > 1:
                counts |= {f"documents_{name}": float(_documents(rows, i)) for i, name in enumerate(self.sources)}
            faults = sum(shard.counts[f"faults/{name}"] for name in self.sources)
            found[f"shard {number}"] = counts | {"split_documents": float(shard.counts["split_documents"])}
            # Hosts have the same rows of a shard, or none in common.
            found[f"shard {number}, rows from {shard.own[0]}"] = {"faulty_documents": float(faults)}
        return found

    def name(self, source: int, record: int) -> tuple[str, str]:
        return self.sources[source], self._sources[source].key(record)

    def close(self) -> None:
        """Stops the threads and processes that read ahead."""
        for shard in self._shards.values():
            shard.close()

    def get_state(self) -> dict[str, Any]:
        """The position and the fingerprint of the stream, JSON-serialisable.

        It covers the shards of this host; the states of several hosts can be merged by their keys.
        """
        shards = {str(number): shard.get_state() for number, shard in self._shards.items()}
        position = {"offset": self._offset, "skipped": self._skipped, "earlier": self._earlier}
        return {"fingerprint": self.fingerprint, **position, "shards": shards}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continues exactly after the batch at which the state was saved.

        Raises:
          UserError: the state is of another stream.
        """
        check_fingerprint(self.fingerprint, state["fingerprint"])
        self._skipped = state["skipped"]
        if (state["offset"], state["earlier"]) != (self._offset, self._earlier):
            self._earlier = state["earlier"]
            self._start(state["offset"])
        for number, shard in self._shards.items():
            shard.set_state(state["shards"][str(number)])

    def resume(self, state: Mapping[str, Any], *, differing: Collection[str] = (), skip_windows: int = 0) -> int:
        """Continues at a saved state; near it, at the granularity of windows, if something is to change.

        Then all windows that were begun count as read, and the rest of each old shard's current window is skipped for
        this epoch. Where shards had drifted apart, some windows are skipped or repeated.

        Args:
          differing: entries of the fingerprint that may differ: `DIVISION`, whose stream is now divided differently,
            and `mixture`, whose new weights hold from here on.
          skip_windows: windows to have left out since the run began; those that were left out before count.

        Returns:
          how many windows are left out now.

        Raises:
          UserError: the state is of another stream, or more windows were left out before.
        """
        skip = skip_windows - state["skipped"] if skip_windows else 0
        if skip < 0:
            raise UserError(f"skip_windows={skip_windows}: this run has already left out {state['skipped']}")
        if not differing and not skip:
            self.set_state(state)
            return 0
        check_fingerprint(self.fingerprint, state["fingerprint"], but=differing)
        begun = state["offset"] + sum(_windows(shard["iterator"]) for shard in state["shards"].values())
        self._skipped, self._earlier = state["skipped"] + skip, state["earlier"]
        mixture, before = self.fingerprint["mixture"], state["fingerprint"]["mixture"]
        if mixture != before:
            self._earlier = [*self._earlier, [begun, {name: entry["weight"] for name, entry in before.items()}]]
        self._start(begun + skip)
        return skip


def rows_of_shards(own: Sequence[int], per_shard: int) -> dict[int, list[int]]:
    """The shards that a host reads, each with the host's rows in it.

    >>> rows_of_shards([2, 3, 4], per_shard=4)
    {0: [2, 3], 1: [0]}

    Args:
      own: the host's rows of a batch.
      per_shard: rows of a batch that a shard fills.
    """
    shards: dict[int, list[int]] = {}
    for row in own:
        shards.setdefault(row // per_shard, []).append(row % per_shard)
    return dict(sorted(shards.items()))


DIVISION = ("shards", "workers")  # fields that decide which process reads a window, not what it contains


def _windows(state: Any) -> int:
    """Number of windows that a Grain iterator has begun, over all its workers.

    `next_index` of its MapDataset is the window being read, of which `next_index_in_buffer` rows have been yielded.
    """
    if isinstance(state, Mapping):
        own = int(state.get("next_index", 0)) + (int(state.get("next_index_in_buffer", 0)) > 0)
        return own + sum(map(_windows, state.values()))
    return sum(map(_windows, state)) if isinstance(state, list | tuple) else 0


def _join(parts: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Concatenates parts of a batch; a single part is not copied."""
    if len(parts) == 1:
        return parts[0]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _documents(described: Mapping[str, np.ndarray], source: int) -> int:
    """Number of documents of a source in rows [B, S]."""
    first = np.diff(described["segments"], prepend=0, axis=1) > 0
    return int((first & (described["source_ids"] == source)).sum())


def check_fingerprint(own: Mapping[str, Any], saved: Mapping[str, Any], but: Collection[str] = ()) -> None:
    """Raises unless a saved state is of the same stream; Grain itself would silently accept one of another seed.

    Args:
      but: names of entries that may differ.
    """
    for name, value in own.items():
        if name not in but and saved.get(name) != value:
            if name == "images":
                raise UserError(
                    "input pipeline: images of the .jsonl source were replaced, removed or copied since the checkpoint "
                    "was taken (another size or time of change); restore them, or use a new work directory"
                )
            mend = ", or pass reshard_data to resume near its position" if name in DIVISION else ""
            raise UserError(
                f"input pipeline: the checkpoint was taken with {name}={saved.get(name)}, this run has {name}={value}; "
                f"use the same config.data, or a new work directory{mend}"
            )


def _fingerprint(
    data: DataConfig,
    sources: Mapping[str, Source],
    tokenizer: Tokenizer,
    queries: int,
    image_size: int,
    learn_image_token: bool,
) -> dict[str, Any]:
    """Everything that determines the batches, by name. Paths are not included, because folders may be moved."""
    fields = dataclasses.asdict(data)
    for name in ("source", "max_faults", "max_padding", "batch_samples", "image_fingerprint"):
        del fields[name]
    for entry in fields["mixture"].values():
        del entry["source"]
    more: dict[str, Any] = {
        "records": {name: source.fingerprint for name, source in sources.items()},
        "tokenizer": tokenizer.fingerprint,
        "queries": queries,
        "image_size": image_size,
        "learn_image_token": learn_image_token,
        "stream": STREAM,
    }
    images = {name: source.images_fingerprint for name, source in sources.items() if source.images_fingerprint}
    if images:
        more["images"] = images
    if not data.mixture:  # a single source has its path as its name
        more |= {name: next(iter(more[name].values())) for name in ("records", "images") if name in more}
    return json.loads(json.dumps(fields | more))


def train_tokenizer(
    data: DataConfig, image_size: int, *, vocab_size: int, model_type: str, also: Sequence[str] = ()
) -> Tokenizer:
    """Trains a tokenizer on the distinct texts of all sources.

    Args:
      also: further sources, which the model will read later.
    """
    more = (open_source(name, "train", image_size, data.pairs, max_faults=data.max_faults) for name in also)
    sources = [*data.open(image_size).values(), *more]
    texts = [text for source in sources for text in source.texts()]
    return Tokenizer.train(list(dict.fromkeys(texts)), vocab_size=vocab_size, model_type=model_type)
