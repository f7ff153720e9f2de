"""The Grain pipeline: sources -> mixture -> documents -> tokens -> packed rows -> batches of fixed shape.

In: `config.data`, a tokenizer and what the model expects of an image. Out: an iterator of dicts with the fields of
`models.emu.Batch`, the same for the same seed, whose state is saved and restored with the model.

    windows of packed rows (windows.py) ─ K shards ─ rows ─ batch
    (any of them can be computed alone)    (state: window, row in it)

Shard k reads every K-th window and fills the k-th part of every batch. A host reads the shards whose rows its devices
hold, and of their rows decodes the images of its own alone. So the batches depend on K, not on the number of hosts,
and a state is one for any number of them: with K = 1 every host plans all rows; with as many shards as hosts, each
reads its own records and no other's.
"""

from __future__ import annotations

import collections
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import grain
import numpy as np
from absl import flags

from emu_jax.data.frames import FRAMES, FrameSampling
from emu_jax.data.mixture import UNITS, SourceConfig
from emu_jax.data.packing import CONTINUES, batch_metrics, build_row
from emu_jax.data.row_sizes import size_rows
from emu_jax.data.samples import Samples
from emu_jax.data.sequence import CHAT_CUTS, TokenizedDocument
from emu_jax.data.sources import PairOrder, Source, open_source
from emu_jax.data.tokenizer import Tokenizer
from emu_jax.data.windows import Rows, make_windows
from emu_jax.errors import UserError, check_fields

STREAM = 5  # counts up when the same settings begin to give other batches, or a state to say something else
DESCRIBING = (
    "slots",
    "segments",
    "source_ids",
    "cuts",
    "visual_weights",
)  # what describes the batch
ENOUGH = 1000  # documents of a source after which its share of faults is judged


class Stream(Protocol):
    """An iterator of batches whose position can be taken and given back."""

    def __next__(self) -> dict[str, np.ndarray]: ...

    def describe(self) -> dict[str, float]:
        """What is worth logging of the newest batch: counts of images and tokens, shares."""
        ...

    def get_state(self) -> dict[str, Any]: ...

    def set_state(self, state: Mapping[str, Any]) -> None: ...

    def reshard(self, state: Mapping[str, Any]) -> None:
        """Goes on near a state's position where the stream is divided in another way."""
        ...

    def close(self) -> None: ...


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """`config.data`.

    Attributes:
      source, split: a folder of `emu-jax prepare` and its split, `fluent_emoji` and one of its splits, or a .jsonl file
        (its split is not read).
      mixture: where `source` is empty, several by name, with their weights.
      mixture_unit: what these weights count: samples (packed sequences), records, or tokens.
      predicted_share: share of documents whose images are predicted; those of the others are only read. With 1 and
        without `model.stop_target_inputs`, as published, every image is both.
      chat_cut: what becomes of a chat behind a cut: "turn" repeats the system message and the images so far before the
        next question, "drop" leaves the rest out.
      row_tokens, row_images, batch_rows: S, I and B of a batch, over all hosts. row_images 0: as many as fit the
        documents, measured at start.
      batch_samples: where batch_rows is 0, samples of a batch on average, of which batch_rows follows at start.
      max_padding: share of padding above which a run is refused; 1 refuses none.
      packing_window: records that are packed together; more fill rows better and cost memory.
      shards: K; it divides batch_rows. Another number gives another stream.
      workers: processes that prepare the rows of a shard; 0 is one thread. Another number gives another stream.
      max_faults: share of a source's documents that may have unreadable images; they are left out of the loss.
      video_frames, frame_sampling: how many of a prepared video's frames a sample shows, and which (`FrameSampling`).
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
    shards: int = 1
    max_faults: float = 0.0
    mixture: Mapping[str, SourceConfig] = dataclasses.field(default_factory=dict)
    mixture_unit: str = "samples"
    predicted_share: float = 1.0
    chat_cut: str = "turn"
    batch_samples: int = 0
    max_padding: float = 1.0
    video_frames: int = FRAMES
    frame_sampling: str = "random"

    def __post_init__(self):
        _ = self.frames  # raises where they are wrong
        # Grain cannot count the windows of an endless stream where each is one record.
        for name, least in (("row_tokens", 1), ("packing_window", 2), ("shards", 1)):
            if getattr(self, name) < least:
                raise UserError(f"config.data.{name}={getattr(self, name)}; expected at least {least}")
        if self.row_images < 0:
            raise UserError(
                f"config.data.row_images={self.row_images}; expected 0, which measures and chooses, or more"
            )
        if min(self.batch_rows, self.batch_samples) < 0 or not self.batch_rows + self.batch_samples:
            raise UserError(
                f"config.data.batch_rows={self.batch_rows}, batch_samples={self.batch_samples}; expected rows of a "
                "batch, or 0 and the samples that its rows hold on average"
            )
        if self.batch_rows % self.shards:
            raise UserError(
                f"config.data.batch_rows={self.batch_rows} does not divide by config.data.shards={self.shards}; "
                "expected as many rows of every shard"
            )
        for name in ("max_faults", "predicted_share", "max_padding"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"config.data.{name}={getattr(self, name)}; expected a share of 0 to 1")
        for name, known in (("mixture_unit", UNITS), ("chat_cut", CHAT_CUTS)):
            if getattr(self, name) not in known:
                raise UserError(f"config.data.{name}={getattr(self, name)!r}; choose one of {', '.join(known)}")
        for name, entry in self.mixture.items():
            check_fields(PairOrder, f"config.data.mixture.{name}.pairs", entry.pairs)
            dataclasses.replace(self.pairs, **entry.pairs)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> DataConfig:
        check_fields(cls, "config.data", fields)
        check_fields(PairOrder, "config.data.pairs", fields["pairs"])
        entries = {} if fields["source"] else dict(fields.get("mixture", {}))
        mixture = {name: SourceConfig.from_dict(name, entry) for name, entry in entries.items()}
        mixture = {name: entry for name, entry in mixture.items() if entry.weight}
        return cls(**(dict(fields) | {"pairs": PairOrder(**dict(fields["pairs"])), "mixture": mixture}))

    @property
    def frames(self) -> FrameSampling:
        """Which frames of a video a sample shows."""
        return FrameSampling(self.video_frames, self.frame_sampling)

    @property
    def sources(self) -> dict[str, SourceConfig]:
        """All of them by name; the only one is called after what it is."""
        return dict(self.mixture) or {self.source: SourceConfig(self.source, self.split)}

    def open(self, image_size: int) -> dict[str, Source]:
        """Their records.

        Raises:
          UserError: a source is not named, or not there.
        """
        for name, entry in self.mixture.items():
            if not entry.source:
                raise UserError(
                    f"config.data.mixture.{name}.source is empty; name a folder of `emu-jax prepare`, set "
                    f"config.data.mixture.{name}.weight=0 to leave it out, or config.data.source for that one alone"
                )
        if not self.source and not self.mixture:
            raise UserError(
                "config.data.source is empty, and so is config.data.mixture; name a folder of `emu-jax prepare`, a "
                ".jsonl file or fluent_emoji"
            )
        return {
            name: open_source(
                s.source,
                s.split,
                image_size,
                dataclasses.replace(self.pairs, **s.pairs),
                subsequences=s.subsequences,
                frames=self.frames,
            )
            for name, s in self.sources.items()
        }


Built = tuple[dict[str, np.ndarray], list[tuple[int, str]]]  # a row's arrays, and its faults
Build = Callable[[list[TokenizedDocument], int], Built]  # of a row's documents, and its place in a batch


class _Builder:
    """Builds a shard's rows.

    Where one process builds all of them, the rows of a batch share one array of images: it needs no copying together.

    Args:
      places: of the shard's part of a batch, the rows that this host decodes.
    """

    def __init__(self, data: DataConfig, image_size: int, pad_id: int, places: Sequence[int]):
        self._sizes = {"row_tokens": data.row_tokens, "row_images": data.row_images, "image_size": image_size}
        self._pad_id, self._numbers = pad_id, {place: number for number, place in enumerate(places)}
        self._shared = data.workers == 0
        self._images: np.ndarray | None = None

    def __call__(self, documents: list[TokenizedDocument], place: int) -> Built:
        number, images = self._numbers.get(place), None
        if self._shared and number is not None:
            if number == 0:
                size = self._sizes["image_size"]
                self._images = np.zeros((len(self._numbers), self._sizes["row_images"], size, size, 3), np.uint8)
            assert self._images is not None  # rows come in order
            images = self._images[number]
        with_images = number is not None
        return build_row(documents, **self._sizes, pad_id=self._pad_id, with_images=with_images, images=images)


def _stacked(arrays: list[np.ndarray]) -> np.ndarray:
    """[…] each -> [B, …]: the array whose rows they are, or else a copy."""
    whole = arrays[0].base
    if whole is not None and len(whole) == len(arrays) and all(array.base is whole for array in arrays):
        return whole
    return np.stack(arrays)


_worker = (0, 1)  # which of how many processes that prepare rows this one is


def _become_worker(index: int, count: int) -> None:
    global _worker
    _worker = (index, count)


class _BuiltRows(grain.IterDataset):
    """Rows of documents -> built rows, knowing which place of a batch they will take."""

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

    def __next__(self) -> Built:
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


class _Shard:
    """The rows of one shard: an iterator of its parts of batches, whose position can be taken and given back.

    Args:
      windows: those that are this shard's.
      places: of the shard's part of a batch, the rows that this host decodes.
    """

    def __init__(self, windows: grain.MapDataset, data: DataConfig, build: Build, rows: Rows, places: list[int]):
        per_batch = data.batch_rows // data.shards

        def assemble(built: list[Built]) -> dict[str, Any]:
            part: dict[str, Any] = {
                name: _stacked([built[place][0][name] for place in places]) for name in built[places[0]][0]
            }
            part["whole"] = {name: np.stack([row[name] for row, _ in built]) for name in DESCRIBING}
            part["faults"] = [fault for _, faults in built for fault in faults]
            return part

        # One thread reads ahead by two windows: enough to hide the packing, little enough to forget.
        stream = windows.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2))
        stream = _BuiltRows(grain.experimental.FlatMapIterDataset(stream, rows), build, per_batch)
        if data.workers:
            if not flags.FLAGS.is_parsed():  # Grain's worker processes read absl flags
                flags.FLAGS.mark_as_parsed()
            options = grain.multiprocessing.MultiprocessingOptions(num_workers=data.workers)
            stream = stream.mp_prefetch(options, worker_init_fn=_become_worker)
        # Batching comes after the processes: a batch never depends on how many rows a worker has left.
        stream = stream.batch(per_batch, drop_remainder=True, batch_fn=assemble)
        # Another thread decodes the next batch's images.
        self._iterator = iter(grain.experimental.ThreadPrefetchIterDataset(stream, prefetch_buffer_size=1))
        self.counts: collections.Counter[str] = collections.Counter()

    def __next__(self) -> dict[str, Any]:
        return next(self._iterator)

    def get_state(self) -> dict[str, Any]:
        return {"iterator": self._iterator.get_state(), "counts": dict(self.counts)}

    def set_state(self, state: Mapping[str, Any]) -> None:
        self._iterator.set_state(state["iterator"])
        self.counts = collections.Counter(state["counts"])

    def close(self) -> None:
        self._iterator.close()


class Pipeline:
    """An iterator of batches whose state can be taken and given back; endless unless every source has its epochs.

    Args:
      data: `config.data`; sizes of rows that it leaves open are measured and chosen.
      tokenizer: its vocabulary is the model's.
      queries, image_size: Q and pixels of a side, as the model reads images.
      own: rows of a batch -> this host's of them (`train.mesh.own_rows`), in order; None: all.
      learn_image_token: label [IMG], so that the model learns when an image comes.
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
        sources = data.open(image_size)
        self.sources = list(sources)  # their names, by number
        samples = Samples(sources, tokenizer, data, queries, learn_image_token)
        self.data, self.fill = size_rows(data, samples, queries)
        self.samples = samples.with_rows(self.data)
        self.fingerprint = _fingerprint(self.data, sources, tokenizer, queries, image_size, learn_image_token)
        self._tokenizer, self._image_size = tokenizer, image_size
        self._windows = make_windows(self.samples, self.data)
        self._own = list(range(self.data.batch_rows)) if own is None else own(self.data.batch_rows)
        self._whole: dict[str, np.ndarray] = {}  # the newest batch's `DESCRIBING`
        self._shards: dict[int, _Shard] = {}
        self._start(0)

    def _start(self, offset: int) -> None:
        """Makes the shards anew, from the window `offset` of the stream on."""
        data, rows = self.data, Rows(self.data)
        windows = self._windows[offset:]
        self.close()
        self._offset, self._shards = offset, {}
        per_batch = data.batch_rows // data.shards
        for shard in sorted({row // per_batch for row in self._own}):
            places = [row - shard * per_batch for row in self._own if row // per_batch == shard]
            build = _Builder(data, self._image_size, self._tokenizer.pad_id, places)
            self._shards[shard] = _Shard(windows[shard :: data.shards], data, build, rows, places)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        parts = []
        for shard in self._shards.values():
            part = next(shard)
            faults = part.pop("faults")
            whole = part["whole"]
            shard.counts["split_documents"] += int((whole["cuts"] & CONTINUES).sum())
            for source, name in enumerate(self.sources):
                documents = _documents(whole, source)
                shard.counts[f"documents/{name}"] += documents
                shard.counts[f"faults/{name}"] += sum(fault[0] == source for fault in faults)
            parts.append(part)
            self._judge(faults)
        wholes = [part.pop("whole") for part in parts]
        batch, self._whole = _join(parts), _join(wholes)
        del batch["cuts"]
        if len(self.sources) == 1:
            del batch["source_ids"]
        return batch

    def _judge(self, faults: list[tuple[int, str]]) -> None:
        for source, message in faults:
            name = self.sources[source]
            found, documents = self.count(f"faults/{name}"), self.count(f"documents/{name}")
            if found > self.data.max_faults * max(documents, ENOUGH):
                raise UserError(
                    f"config.data source {name}: {found} of its first {documents} documents have unreadable images, "
                    f"more than config.data.max_faults={self.data.max_faults}; the last: {message}"
                )

    @property
    def cuts(self) -> np.ndarray:
        """int32 [B, S], of the newest batch's rows: at each document's first position how it was cut (`build_row`)."""
        return self._whole["cuts"]

    def count(self, name: str) -> int:
        """Of all batches so far: `split_documents` (cuts through over-long ones), `documents/…` and `faults/…` of a
        source. Documents and cuts are those of the shards that this host reads; faults, of the rows that it decodes."""
        return sum(shard.counts[name] for shard in self._shards.values())

    def describe(self) -> dict[str, float]:
        """Counts and shares of the newest batch, and counts of the whole run so far."""
        faults = sum(self.count(f"faults/{name}") for name in self.sources)
        described = batch_metrics(self._whole, self.data.row_images)
        described |= {"split_documents": self.count("split_documents"), "faulty_documents": faults}
        if len(self.sources) > 1:
            described |= {f"documents_{name}": _documents(self._whole, i) for i, name in enumerate(self.sources)}
        return described

    def close(self) -> None:
        """Stops the threads and processes that read ahead."""
        for shard in self._shards.values():
            shard.close()

    def get_state(self) -> dict[str, Any]:
        """JSON-serialisable: where the stream stands, and a fingerprint of what it is. Of this host's shards: the
        states of several hosts are joined by their keys."""
        shards = {str(number): shard.get_state() for number, shard in self._shards.items()}
        return {"fingerprint": self.fingerprint, "offset": self._offset, "shards": shards}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continues exactly behind the batch after which the state was taken."""
        check_fingerprint(self.fingerprint, state["fingerprint"])
        if state["offset"] != self._offset:
            self._start(state["offset"])
        for number, shard in self._shards.items():
            shard.set_state(state["shards"][str(number)])

    def reshard(self, state: Mapping[str, Any]) -> None:
        """Goes on where another division into shards or workers was left, window by window.

        As many windows as were begun count as read. Of this epoch are left out: the rest of each old shard's (and
        worker's) last window, and what a shard was behind the others by; what one was ahead by comes twice.
        """
        check_fingerprint(self.fingerprint, state["fingerprint"], but=DIVISION)
        begun = sum(_windows(shard["iterator"]) for shard in state["shards"].values())
        self._start(state["offset"] + begun)


DIVISION = ("shards", "workers")  # fields that decide who reads which window, not what stands in it


def _windows(state: Any) -> int:
    """Windows that a Grain iterator has begun, all workers' together.

    Its MapDataset's `next_index` is the window that is being read, from which `next_index_in_buffer` rows are gone.
    """
    if isinstance(state, Mapping):
        own = int(state.get("next_index", 0)) + (int(state.get("next_index_in_buffer", 0)) > 0)
        return own + sum(map(_windows, state.values()))
    return sum(map(_windows, state)) if isinstance(state, list | tuple) else 0


def _join(parts: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Parts of a batch -> all of it; of one part nothing is copied."""
    if len(parts) == 1:
        return parts[0]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _documents(whole: Mapping[str, np.ndarray], source: int) -> int:
    """Documents of a source in rows [B, S]."""
    first = np.diff(whole["segments"], prepend=0, axis=1) > 0
    return int((first & (whole["source_ids"] == source)).sum())


def check_fingerprint(own: Mapping[str, Any], saved: Mapping[str, Any], but: Sequence[str] = ()) -> None:
    """Raises unless a saved state is of the same stream: Grain itself accepts one of another seed without a word."""
    for name, value in own.items():
        if name not in but and saved.get(name) != value:
            way = ", or --reshard-data to go on near its place" if name in DIVISION else ""
            raise UserError(
                f"input pipeline: the checkpoint was taken with {name}={saved.get(name)}, this run has {name}={value}; "
                f"use the same config.data, or a new work directory{way}"
            )


def _fingerprint(
    data: DataConfig,
    sources: Mapping[str, Source],
    tokenizer: Tokenizer,
    queries: int,
    image_size: int,
    learn_image_token: bool,
) -> dict[str, Any]:
    """Everything that decides which batch comes when, by name. Paths may move; what they hold is what counts."""
    fields = dataclasses.asdict(data)
    del fields["source"], fields["max_faults"], fields["max_padding"], fields["batch_samples"]
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
    if not data.mixture:  # its only source is named by its path
        more["records"] = next(iter(more["records"].values()))
    return json.loads(json.dumps(fields | more))


def train_tokenizer(
    data: DataConfig, image_size: int, *, vocab_size: int, model_type: str, also: Sequence[str] = ()
) -> Tokenizer:
    """A tokenizer from the sources' own texts, each counted once, and those of the sources in `also`, read later."""
    sources = [*data.open(image_size).values(), *(open_source(name, "train", image_size, data.pairs) for name in also)]
    texts = [text for source in sources for text in source.texts()]
    return Tokenizer.train(list(dict.fromkeys(texts)), vocab_size=vocab_size, model_type=model_type)
