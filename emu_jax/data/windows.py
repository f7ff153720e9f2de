"""Sources -> windows of packed rows: records are mixed, turned into samples, and packed one window at a time.

    places of records ─ mixture.py ─ windows of `packing_window` records, read together ─ samples.py ─ packing.py ─ rows

A window is a pure function of its number, whatever was read before, and the same on every host.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import grain
import numpy as np

from emu_jax.data.config import DataConfig
from emu_jax.data.mixture import mix
from emu_jax.data.packing import pack_window
from emu_jax.data.samples import Place, Samples
from emu_jax.data.sequence import TokenizedDocument

Row = list[TokenizedDocument]


class Rows:
    """Grain transform: a window of records' samples -> packed rows, shuffled because the fullest are packed first."""

    max_fan_out = 1_000_000  # required by Grain; a window never gives more rows than samples

    def __init__(self, data: DataConfig):
        self._data = data

    def pack(self, window: list[list[TokenizedDocument]], rng: np.random.Generator) -> list[Row]:
        documents = [piece for record in window for piece in record]
        packed = pack_window(documents, self._data.row_tokens, self._data.row_images)
        return [packed[row] for row in rng.permutation(len(packed))]

    def flat_map(self, rows: list[Row]) -> list[Row]:
        return rows


def make_windows(
    samples: Samples, data: DataConfig, earlier: Sequence[tuple[int, Mapping[str, float]]] = ()
) -> grain.MapDataset:
    """The stream of windows, each a list of rows. `data.row_images` must be set.

    Args:
      earlier: (end, weights by source): the weights that held up to that window.
    """
    rates = samples.per_record(data.mixture_unit, data.row_images)
    records = [(end * data.packing_window, weights) for end, weights in earlier]
    return (
        mix(samples.lengths, data.sources, data.seed, rates, records)
        .seed(data.seed)
        .random_map(_with_generator)
        .batch(data.packing_window, drop_remainder=False, batch_fn=samples)
        .random_map(Rows(data).pack)
    )


def _with_generator(place: Place, rng: np.random.Generator) -> tuple[Place, np.random.Generator]:
    """A record's place with a generator of its own: Grain takes its generator back for the next record."""
    return place, copy.deepcopy(rng)
