"""A Grain pipeline of examples that all have one shape: shuffled, batched, and resumed exactly.

In: anything with a length and `examples([(index, generator), …]) -> arrays by name, for each`. Out: batches of these
arrays, stacked.
Each host reads its own rows of every batch; batches and states do not depend on the number of hosts.
"""

from __future__ import annotations

import bisect
import collections
import copy
import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import grain
import numpy as np

from emu_jax.data.counts import Counts
from emu_jax.data.document import Image
from emu_jax.data.images import ImageError
from emu_jax.data.pipeline import MIN_JUDGED_DOCUMENTS, STREAM, check_fingerprint
from emu_jax.data.sources import PairOrder, open_source
from emu_jax.errors import UserError, check_fields


@dataclasses.dataclass(frozen=True)
class MixedSource:
    """`config.data.mixture.<name>` of the objectives vae and decoder.

    Attributes:
      source: like `config.data.source`.
      split: part of the source; empty: `config.data.split`.
      weight: share of the examples, relative to the other sources' weights; 0 leaves it out.
    """

    source: str
    split: str = ""
    weight: float = 1.0

    @classmethod
    def from_dict(cls, name: str, fields: Mapping[str, Any]) -> MixedSource:
        check_fields(cls, f"config.data.mixture.{name}", fields)
        entry = cls(**dict(fields))
        if not 0 <= entry.weight < math.inf:
            raise UserError(f"config.data.mixture.{name}.weight={entry.weight}; expected 0 or more")
        return entry


@dataclasses.dataclass(frozen=True)
class ExamplesConfig:
    """`config.data` of the objectives vae and decoder.

    Attributes:
      source: for vae, as in pretraining (`DataConfig.source`); for decoder, a folder of `emu-jax precompute`.
      split: the source's split.
      batch: examples per step, over all hosts.
      mixture: several sources by name, instead of one; see `MixedSource`.
      max_faults: share of a source's examples whose images may be unreadable, and of a .jsonl file's lines that may
        hold no document. Another example is drawn in the place of such a one. Latents have no images to read.
    """

    source: str
    split: str
    seed: int
    batch: int
    mixture: Mapping[str, MixedSource] = dataclasses.field(default_factory=dict)
    max_faults: float = 0.0

    def __post_init__(self):
        if not 0 <= self.max_faults <= 1:
            raise UserError(f"config.data.max_faults={self.max_faults}; expected a share of 0 to 1")
        if self.batch < 1:
            raise UserError(f"config.data.batch={self.batch}; expected at least 1")

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> ExamplesConfig:
        check_fields(cls, "config.data", fields)
        entries = {name: MixedSource.from_dict(name, each) for name, each in fields.get("mixture", {}).items()}
        return cls(**{**fields, "mixture": {name: entry for name, entry in entries.items() if entry.weight}})


Drawn = tuple[int, np.random.Generator]  # index of a record, and a generator of its own


class ExampleSource(Protocol):
    """What the pipeline needs from a source of examples."""

    fingerprint: str

    def __len__(self) -> int: ...

    def key(self, index: int) -> str:
        """What example `index` is called where it comes from."""
        ...

    def examples(self, drawn: Sequence[Drawn]) -> list[dict[str, np.ndarray]]:
        """An example for each index, drawn by its generator; the records of one call are read at the same time."""
        ...


Source = TypeVar("Source", bound=ExampleSource)


class Images:
    """The images of a source of documents, one per record, drawn at random: {"pixels": uint8 [H, W, 3]}.

    Attributes:
      remark: a line about what the source leaves out, or "".
    """

    def __init__(self, source: str, split: str, image_size: int, max_faults: float = 0.0):
        self._source = open_source(source, split, image_size, PairOrder("image_first"), max_faults=max_faults)
        self._name, self.remark = source, self._source.remark
        self.fingerprint = self._source.fingerprint + self._source.images_fingerprint

    def __len__(self) -> int:
        return len(self._source)

    def key(self, index: int) -> str:
        return self._source.key(index)

    def examples(self, drawn: Sequence[Drawn]) -> list[dict[str, np.ndarray]]:
        records = self._source.read([index for index, _ in drawn])
        return [self._example(record, *place) for record, place in zip(records, drawn, strict=True)]

    def _example(self, record: Any, index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        parts = [part for document in self._source.documents(record, rng) for part in document.parts]
        images = [part for part in parts if isinstance(part, Image)]
        if not images:
            raise UserError(
                f"config.data.source {self._name}: record {index} holds no image; expected one in every record"
            )
        return {"pixels": images[rng.integers(len(images))].pixels}


class Mixed:
    """Several sources as one, each with its share of the examples.

    In an epoch every example is drawn, and those of a source that is small for its weight are drawn several times.
    """

    def __init__(self, sources: Mapping[str, ExampleSource], weights: Mapping[str, float]):
        self._sources, self._names = list(sources.values()), list(sources)
        epoch = max(len(source) / weights[name] for name, source in sources.items())
        self._ends = list(itertools.accumulate(max(1, round(weights[name] * epoch)) for name in sources))
        parts = {name: [source.fingerprint, weights[name]] for name, source in sources.items()}
        self.fingerprint = json.dumps(parts)

    def __len__(self) -> int:
        return self._ends[-1]

    def _place(self, index: int) -> tuple[int, int]:
        number = bisect.bisect_right(self._ends, index)
        start = self._ends[number - 1] if number else 0
        return number, (index - start) % len(self._sources[number])

    def name(self, index: int) -> str:
        """The source of an example."""
        return self._names[self._place(index)[0]]

    def key(self, index: int) -> str:
        number, place = self._place(index)
        return self._sources[number].key(place)

    def examples(self, drawn: Sequence[Drawn]) -> list[dict[str, np.ndarray]]:
        places = [self._place(index) for index, _ in drawn]
        found: dict[int, dict[str, np.ndarray]] = {}
        for number, source in enumerate(self._sources):
            rows = [row for row, (own, _) in enumerate(places) if own == number]
            some = source.examples([(places[row][1], drawn[row][1]) for row in rows]) if rows else []
            found |= dict(zip(rows, some, strict=True))
        return [found[row] for row in range(len(drawn))]


def open_examples(data: ExamplesConfig, opened: Callable[[str, str], Source]) -> tuple[ExampleSource, list[Source]]:
    """The source of `config.data`, and those of which it consists.

    Args:
      opened: opens one, by its name and its split.

    Raises:
      UserError: a source of the mixture has no name.
    """
    if data.source or not data.mixture:
        one = opened(data.source, data.split)
        return one, [one]
    for name, entry in data.mixture.items():
        if not entry.source:
            raise UserError(
                f"config.data.mixture.{name}.source is empty; name one, or set config.data.mixture.{name}.weight=0"
            )
    sources = {name: opened(entry.source, entry.split or data.split) for name, entry in data.mixture.items()}
    return Mixed(sources, {name: entry.weight for name, entry in data.mixture.items()}), list(sources.values())


class _Share(grain.MapDataset):
    """The elements at the indices `own` of every `batch` elements."""

    def __init__(self, parent: grain.MapDataset, batch: int, own: Sequence[int]):
        super().__init__(parent)
        self._batch, self._own = batch, own

    def __len__(self) -> int:
        return len(self._parent) // self._batch * len(self._own)

    def __getitem__(self, index: int) -> Any:
        batch, number = divmod(index, len(self._own))
        return self._parent[batch * self._batch + self._own[number]]


RECORD = "record"  # an example's index, beside its arrays until they leave the pipeline
FAULTS, FAULTY = "faults", "faulty"  # messages about unreadable images of a batch, and the indices of their examples
ERROR = "error"  # in place of a batch
TRIES = 100  # examples that are drawn in the place of one


Found = tuple[list[dict[str, np.ndarray]], list[int], list[tuple[int, str]]]


def _examples(source: ExampleSource, drawn: Sequence[Drawn], replace: bool) -> Found:
    """Examples, their indices, and (index, what is wrong) of those in whose place others were drawn.

    Raises:
      ImageError: an image cannot be read, and is not to be replaced, or `TRIES` others cannot be read either.
    """
    try:
        found = source.examples([(index, copy.deepcopy(rng)) for index, rng in drawn])
        return found, [index for index, _ in drawn], []
    except ImageError:
        if not replace:
            raise
    found, indices, faults = [], [], []
    for index, rng in drawn:
        for tries in range(TRIES + 1):
            try:
                found += source.examples([(index, copy.deepcopy(rng))])
                break
            except ImageError as error:
                if tries == TRIES:
                    raise
                faults.append((index, str(error)))
                index = int(rng.integers(len(source)))
        indices.append(index)
    return found, indices, faults


class ExamplePipeline:
    """An endless stream of batches; see `pipeline.Stream`.

    An example whose image cannot be read is replaced by another one, drawn by its own generator, so that a batch is the
    same for any number of hosts. Faults are counted since this process started, among the rows of this host.

    Args:
      own: the indices of this host's rows in every batch; None means all rows.
    """

    def __init__(self, source: ExampleSource, data: ExamplesConfig, *, own: Sequence[int] | None = None):
        self.fingerprint = dataclasses.asdict(data) | {"records": source.fingerprint, "stream": STREAM}
        for name in ("source", "mixture", "max_faults"):  # the folders may be moved
            del self.fingerprint[name]
        records = (
            grain.MapDataset.range(len(source))
            .seed(data.seed)[:]  # as in `mixture.mix`
            .shuffle()
            .repeat()
            .random_map(lambda index, rng: (int(index), copy.deepcopy(rng)))  # Grain takes its generator back
        )

        def read(drawn: Sequence[Drawn]) -> dict[str, np.ndarray]:
            try:
                examples, indices, faults = _examples(source, drawn, replace=data.max_faults > 0)
            except UserError as error:  # which Grain would give lines of its own
                advice = "; mend it, or raise config.data.max_faults" if isinstance(error, ImageError) else ""
                return {ERROR: np.array(f"{error}{advice}")}
            arrays = {name: np.stack([example[name] for example in examples]) for name in examples[0]}
            told = {
                FAULTY: np.array([index for index, _ in faults], int),
                FAULTS: np.array([m for _, m in faults], str),
            }
            return arrays | {RECORD: np.array(indices)} | told

        own = range(data.batch) if own is None else own
        batches = _Share(records, data.batch, own).batch(len(own), drop_remainder=True, batch_fn=read)
        self._batch, self._source, self._name = data.batch, source, data.source
        self._part, self._max_faults = f"rows from {min(own)}", data.max_faults
        self._read: collections.Counter[str] = collections.Counter()  # examples by source, with faulty ones
        self._faults: collections.Counter[str] = collections.Counter()
        self.records: list[list[tuple[int, int]]] = []
        self._iterator = iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)))

    def __iter__(self) -> ExamplePipeline:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        arrays = dict(next(self._iterator))
        if ERROR in arrays:
            raise UserError(str(arrays[ERROR]))
        self.records = [[(0, int(record))] for record in arrays.pop(RECORD)]
        faulty, faults = arrays.pop(FAULTY), arrays.pop(FAULTS)
        self._read.update(self._whose(record) for ((_, record),) in self.records)
        for index, message in zip(faulty, faults, strict=True):
            name = self._whose(int(index))
            self._read[name] += 1
            self._faults[name] += 1
            if self._faults[name] > self._max_faults * max(self._read[name], MIN_JUDGED_DOCUMENTS):
                raise UserError(
                    f"config.data source {name}: {self._faults[name]} of its first {self._read[name]} documents have "
                    f"unreadable images, more than config.data.max_faults={self._max_faults}; the last: {message}"
                )
        return arrays

    def _whose(self, index: int) -> str:
        return self._source.name(index) if isinstance(self._source, Mixed) else self._name

    def name(self, source: int, record: int) -> tuple[str, str]:
        return self._name, self._source.key(record)

    def counts(self) -> Counts:
        faulty = {self._part: {"faulty_documents": float(self._faults.total())}}
        return {"batch": {"images": float(self._batch)}} | faulty  # images of all hosts

    def get_state(self) -> dict[str, Any]:
        """The position and the fingerprint of the stream, JSON-serialisable."""
        return {"fingerprint": self.fingerprint, "iterator": self._iterator.get_state()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continues exactly after the batch at which the state was saved."""
        check_fingerprint(self.fingerprint, state["fingerprint"])
        self._iterator.set_state(state["iterator"])

    def resume(self, state: Mapping[str, Any], *, differing: Collection[str] = (), skip_windows: int = 0) -> int:
        """Continues exactly: this stream is neither divided nor mixed.

        Raises:
          UserError: the state is of another stream, or windows are to be skipped.
        """
        if skip_windows:
            raise UserError(f"skip_windows={skip_windows}: these examples are not packed, so there are no windows")
        self.set_state(state)
        return 0

    def close(self) -> None:
        """Stops the threads that read ahead."""
        self._iterator.close()
