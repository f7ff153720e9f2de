"""A Grain pipeline of examples that all have one shape: shuffled, batched, and resumed exactly.

In: anything with a length and `examples([(index, generator), …]) -> arrays by name, for each`. Out: batches of these
arrays, stacked.
Each host reads its own rows of every batch; batches and states do not depend on the number of hosts.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol

import grain
import numpy as np

from emu_jax.data.document import Image
from emu_jax.data.pipeline import STREAM, check_fingerprint
from emu_jax.data.sources import PairOrder, open_source
from emu_jax.errors import UserError, check_fields


@dataclasses.dataclass(frozen=True)
class ExamplesConfig:
    """`config.data` of the objectives vae and decoder.

    Attributes:
      source: for vae, as in pretraining (`DataConfig.source`); for decoder, a folder of `emu-jax precompute`.
      split: the source's split.
      batch: examples per step, over all hosts.
    """

    source: str
    split: str
    seed: int
    batch: int

    def __post_init__(self):
        if self.batch < 1:
            raise UserError(f"config.data.batch={self.batch}; expected at least 1")

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> ExamplesConfig:
        check_fields(cls, "config.data", fields)
        return cls(**dict(fields))


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


class Images:
    """The images of a source of documents, one per record, drawn at random: {"pixels": uint8 [H, W, 3]}."""

    def __init__(self, source: str, split: str, image_size: int):
        self._source = open_source(source, split, image_size, PairOrder("image_first"))
        self._name = source
        self.fingerprint = self._source.fingerprint

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
                f"config.data.source {self._name}: record {index} holds no image; expected images, to train a VAE"
            )
        return {"pixels": images[rng.integers(len(images))].pixels}


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


class ExamplePipeline:
    """An endless stream of batches; see `pipeline.Stream`.

    Args:
      own: the indices of this host's rows in every batch; None means all rows.
    """

    def __init__(self, source: ExampleSource, data: ExamplesConfig, *, own: Sequence[int] | None = None):
        self.fingerprint = dataclasses.asdict(data) | {"records": source.fingerprint, "stream": STREAM}
        del self.fingerprint["source"]  # the folder may be moved
        records = (
            grain.MapDataset.range(len(source))
            .seed(data.seed)[:]  # as in `mixture.mix`
            .shuffle()
            .repeat()
            .random_map(lambda index, rng: (int(index), copy.deepcopy(rng)))  # Grain takes its generator back
        )

        def read(drawn: Sequence[Drawn]) -> dict[str, np.ndarray]:
            examples = source.examples(drawn)
            arrays = {name: np.stack([example[name] for example in examples]) for name in examples[0]}
            return arrays | {RECORD: np.array([index for index, _ in drawn])}

        own = range(data.batch) if own is None else own
        batches = _Share(records, data.batch, own).batch(len(own), drop_remainder=True, batch_fn=read)
        self._batch, self._source, self._name = data.batch, source, data.source
        self.records: list[list[tuple[int, int]]] = []
        self._iterator = iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)))

    def __iter__(self) -> ExamplePipeline:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        arrays = dict(next(self._iterator))
        self.records = [[(0, int(record))] for record in arrays.pop(RECORD)]
        return arrays

    def name(self, source: int, record: int) -> tuple[str, str]:
        return self._name, self._source.key(record)

    def describe(self) -> dict[str, float]:
        return {"images": float(self._batch)}

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
