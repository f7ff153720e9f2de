"""Several sources as one stream: the source of the n-th record, and the record's index in that source.

Weights 8 : 4 : 1 give a repeated pattern of 13 records, spread as evenly as possible. If weights count samples or
tokens, a source's share of the records is its weight divided by the mean number per record (measured by `samples.py`).
Each source is shuffled as a whole, anew in every epoch. A source with a number of epochs ends after them, and the
others continue by their weights; the stream ends with the last source.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
import zlib
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import grain

from emu_jax.data import embedded_chats, fluent_emoji
from emu_jax.errors import UserError, check_fields

LONGEST_PATTERN = 100_000
EMBEDDED = (fluent_emoji.NAME, embedded_chats.NAME, embedded_chats.QUESTIONS_NAME)  # sources that are no paths
UNITS = ("samples", "records", "tokens")


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """`config.data.mixture.<name>`: one source of several.

    Attributes:
      source: like `config.data.source`.
      split: part of the source; empty: `config.data.split`.
      weight: share relative to the other sources' weights, in units of `config.data.mixture_unit`; 0 leaves it out.
      epochs: number of passes over the source; 0 never ends.
      subsequences: whether to cut web documents into MMC4's two sequences (`sources.subsequences`).
      text_weight, visual_weight: weights of the two losses of its documents.
      pairs: fields of `config.data.pairs` that differ for this source.
    """

    source: str
    split: str = ""
    weight: float = 1.0
    epochs: int = 0
    subsequences: bool = False
    text_weight: float = 1.0
    visual_weight: float = 1.0
    pairs: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def from_dict(cls, name: str, fields: Mapping[str, Any]) -> SourceConfig:
        where = f"config.data.mixture.{name}"
        check_fields(cls, where, fields)
        config = cls(**(dict(fields) | {"pairs": dict(fields.get("pairs", {}))}))
        if not 0 <= config.weight < math.inf or config.epochs < 0:
            raise UserError(
                f"{where}: weight {config.weight}, epochs {config.epochs}; expected a weight and epochs of 0 or more"
            )
        for field in ("text_weight", "visual_weight"):
            if not 0 <= getattr(config, field) < math.inf:
                raise UserError(f"{where}.{field}={getattr(config, field)}; expected 0 or more")
        return config


def pattern(weights: Sequence[float]) -> list[int]:
    """The order in which sources take turns, each as often as its weight: [2, 1] -> [0, 1, 0].

    Weights whose pattern would be longer than `LONGEST_PATTERN` are rounded to a pattern of that length.

    >>> pattern([4, 2, 1])
    [0, 1, 0, 2, 0, 1, 0]

    Raises:
      UserError: a weight is less than one record in `LONGEST_PATTERN`.
    """
    exact = [Fraction(weight).limit_denominator(LONGEST_PATTERN) for weight in weights]
    scale = math.lcm(*(fraction.denominator for fraction in exact))
    counts = [int(fraction * scale) for fraction in exact]
    common = math.gcd(*counts)
    counts = [count // common for count in counts]
    if sum(counts) > LONGEST_PATTERN or 0 in counts:
        counts = [round(LONGEST_PATTERN * weight / sum(weights)) for weight in weights]
        if 0 in counts:
            raise UserError(
                f"config.data.mixture: of {LONGEST_PATTERN:,} records, weights {list(weights)} give a source none; "
                "expected weights that are closer together, or 0 to leave a source out"
            )
    # Record k of n is at the fraction (k + 1/2) / n of the pattern.
    places = [((k + 0.5) / count, source) for source, count in enumerate(counts) for k in range(count)]
    return [source for _, source in sorted(places)]


class _Phase:
    """The part of a stream in which the same sources take turns."""

    def __init__(self, sources: Sequence[int], weights: Sequence[float], used: Sequence[int]):
        self._pattern = [sources[i] for i in pattern([weights[source] for source in sources])]
        self._used = list(used)  # records of each source before this phase
        self._counts = dict.fromkeys(sources, 0)
        self._ranks = []  # for each position in the pattern: its rank among the positions of its source
        for source in self._pattern:
            self._ranks.append(self._counts[source])
            self._counts[source] += 1

    def index_of(self, source: int, number: int) -> int:
        """The position in this phase of the source's record number `number`."""
        turn, rank = divmod(number, self._counts[source])
        place = next(i for i, s in enumerate(self._pattern) if s == source and self._ranks[i] == rank)
        return turn * len(self._pattern) + place

    def used_after(self, length: int) -> list[int]:
        turns, rest = divmod(length, len(self._pattern))
        used = list(self._used)
        for source, count in self._counts.items():
            used[source] += turns * count + self._pattern[:rest].count(source)
        return used

    def __getitem__(self, index: int) -> tuple[int, int]:
        turn, place = divmod(index, len(self._pattern))
        source = self._pattern[place]
        return source, self._used[source] + turn * self._counts[source] + self._ranks[place]


class Selection(grain.transforms.DatasetSelectionMap):
    """Index in the stream -> (source, index in that source's own stream of `lengths[source]` records).

    Args:
      weights: the sources' weights.
      earlier: (end, weights) of the records before: up to position `end` other weights held. A source continues where
        it was when the weights change.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        weights: Sequence[float],
        earlier: Sequence[tuple[int, Sequence[float]]] = (),
    ):
        self._phases: list[tuple[int, _Phase]] = []  # (first position, phase)
        used, start = [0] * len(lengths), 0
        for end, held in (*earlier, (sys.maxsize, weights)):
            while start < end and (left := [s for s in range(len(lengths)) if used[s] < lengths[s]]):
                phase = _Phase(left, held, used)
                self._phases.append((start, phase))
                ends = (phase.index_of(s, lengths[s] - used[s]) for s in left if lengths[s] != sys.maxsize)
                length = min((end - start, *ends))
                used = phase.used_after(length)
                start += length
        self._length = start

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> tuple[int, int]:
        start, phase = next(p for p in reversed(self._phases) if p[0] <= index)
        return phase[index - start]


def mix(
    lengths: Mapping[str, int],
    sources: Mapping[str, SourceConfig],
    seed: int,
    per_record: Mapping[str, float] | None = None,
    earlier: Sequence[tuple[int, Mapping[str, float]]] = (),
) -> grain.MapDataset:
    """A stream of (number of the source, index of its record).

    Args:
      lengths: number of records of each source, by name and in order.
      per_record: mean number of weighted units (samples or tokens) per record of each source; None if weights count
        records.
      earlier: (end, weights by source): the weights that held up to that record.
    """
    streams = []
    for number, (name, length) in enumerate(lengths.items()):
        # Grain's seeds depend on the slice `[:]`: without it, the seeds of earlier runs would give other streams.
        stream = grain.MapDataset.range(length).seed(seed + zlib.crc32(_salt(name, sources).encode()))[:].shuffle()
        stream = stream.repeat(sources[name].epochs or None)
        streams.append(stream.map(functools.partial(_numbered, number)))

    def rates(weights: Mapping[str, float]) -> list[float]:
        return [weights[name] / (per_record[name] if per_record else 1) for name in lengths]

    now = rates({name: source.weight for name, source in sources.items()})
    before = [(end, rates(weights)) for end, weights in earlier]
    selection = Selection([len(stream) for stream in streams], now, before)
    return grain.MapDataset.select_from_datasets(streams, selection)


def _salt(name: str, sources: Mapping[str, SourceConfig]) -> str:
    """What a source's order depends on beside the seed: its name, but not where a single source is stored."""
    return "" if len(sources) == 1 and name == sources[name].source and name not in EMBEDDED else name


def _numbered(number: int, index: int) -> tuple[int, int]:
    return number, int(index)
