"""Row sizes that the config leaves open, and how full rows are, measured before a run starts.

`config.data.row_images=0` is replaced such that tokens and image slots of rows run out together, and
`config.data.batch_rows=0` such that a batch holds `config.data.batch_samples` samples on average.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

import numpy as np

from emu_jax.data.samples import Samples
from emu_jax.data.windows import Row, make_windows
from emu_jax.errors import UserError

if TYPE_CHECKING:
    from emu_jax.data.pipeline import DataConfig

MEASURED_RECORDS = 512  # of a source
UNCUT_SHARE = 0.95  # of the samples must have no more images than a row has slots
HIGH_PADDING, HIGH_EMPTY_SLOTS = 0.2, 0.3  # shares above which a run prints a remark


@dataclasses.dataclass(frozen=True)
class RowFill:
    """How full the rows of a run's first window are.

    Attributes:
      samples, rows: counts.
      padding: share of the positions that are padding.
      empty_slots: share of the image slots that are empty.
      fitting: number of image slots per row with which tokens and slots would run out together.
    """

    samples: int
    rows: int
    padding: float
    empty_slots: float
    fitting: int

    @property
    def waste(self) -> float:
        """Padding and empty slots, each relative to the share above which a run prints a remark."""
        return self.padding / HIGH_PADDING + self.empty_slots / HIGH_EMPTY_SLOTS

    def remark(self, data: DataConfig) -> str:
        """A line for the start of a run whose rows are wasteful; "" for other runs."""
        if self.padding <= HIGH_PADDING and self.empty_slots <= HIGH_EMPTY_SLOTS:
            return ""
        return f"config.data: {self.describe()}; {self.advice(data)}"

    def describe(self) -> str:
        return (
            f"{self.padding:.1%} of the positions are padding and {self.empty_slots:.1%} of the image slots are empty"
        )

    def advice(self, data: DataConfig) -> str:
        """Row sizes that would be less wasteful."""
        if self.fitting != data.row_images:
            return f"row_images={self.fitting} would fit better than {data.row_images} for row_tokens={data.row_tokens}"
        return f"larger rows than row_tokens={data.row_tokens}, row_images={data.row_images} would be fuller"


def fitting_images(tokens: int, images: int, row_tokens: int) -> int:
    """Image slots per row, at least 1, that fit data with this ratio of tokens to images."""
    return max(1, round(row_tokens * images / max(tokens, 1)))


def size_rows(data: DataConfig, samples: Samples, queries: int) -> tuple[DataConfig, RowFill]:
    """Fills in row sizes that the config leaves open; returns the config, and how full its rows are.

    Args:
      samples: the samples of the same config.
      queries: Q, embeddings per image.

    Raises:
      UserError: padding exceeds `data.max_padding`, or no document fits a row.
    """
    if data.row_images:
        fill = _first_rows(data, samples)
    else:
        choices = _row_images(data, samples, queries)
        fills = {choice: _first_rows(dataclasses.replace(data, row_images=choice), samples) for choice in choices}
        best = min(fills, key=lambda choice: fills[choice].waste)
        data, fill = dataclasses.replace(data, row_images=best), dataclasses.replace(fills[best], fitting=best)
    if not data.batch_rows:
        rows_per_shard = data.batch_samples * fill.rows / fill.samples / data.shards
        data = dataclasses.replace(data, batch_rows=max(1, round(rows_per_shard)) * data.shards)
    if fill.padding > data.max_padding:
        raise UserError(
            f"config.data.max_padding={data.max_padding}: {fill.describe()}; {fill.advice(data)}, "
            "config.data.row_images=0 measures and chooses"
        )
    return data, fill


def _first_rows(data: DataConfig, samples: Samples) -> RowFill:
    """How full the rows of the first window are."""
    rows: list[Row] = make_windows(samples.with_rows(data), data)[0]
    if not rows:
        raise UserError(
            f"config.data: the first {data.packing_window} records give no sample; expected documents that fit "
            f"at least partly into a row of row_tokens={data.row_tokens}"
        )
    tokens = sum(len(document) for row in rows for document in row)
    images = sum(len({image.key for document in row for image in document.images}) for row in rows)
    return RowFill(
        samples=sum(map(len, rows)),
        rows=len(rows),
        padding=1 - tokens / (len(rows) * data.row_tokens),
        empty_slots=1 - images / (len(rows) * data.row_images) if images else 0.0,
        fitting=fitting_images(tokens, images, data.row_tokens),
    )


def _row_images(data: DataConfig, samples: Samples, queries: int) -> list[int]:
    """Numbers of image slots per row to try: the mixture's mean for a row's tokens, rounded down and up.

    None is less than what nearly all samples need.
    """
    most = data.row_tokens // (queries + 2)
    rates = samples.per_record(data.mixture_unit, most, MEASURED_RECORDS) or {}
    tokens = images = 0.0
    shown: list[tuple[int, float]] = []  # (images of a sample, frequency of that sample)
    for number, (name, entry) in enumerate(data.sources.items()):
        records = samples.measure(number, MEASURED_RECORDS, most)
        rate = entry.weight / rates.get(name, 1.0) / len(records)
        for record in records:
            tokens += rate * sum(map(len, record))
            images += rate * len({image.key for document in record for image in document.images})
            shown += [(len(document.images), rate) for document in record]
    counts, often = (np.array(values) for values in zip(*sorted(shown), strict=True)) if shown else ([0], [1.0])
    share = np.cumsum(often) / np.sum(often)
    nearly_all = int(counts[np.searchsorted(share, UNCUT_SHARE)])
    exact = data.row_tokens * images / max(tokens, 1.0)
    return sorted({min(max(1, nearly_all, way(exact)), most) for way in (math.floor, math.ceil)})
