"""How large rows are where the config leaves it open, and how full they get: measured before a run begins.

`config.data.row_images=0` is chosen so that rows run out of tokens and of image slots together;
`config.data.batch_rows=0` so that a batch holds `config.data.batch_samples` samples on average.
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

MEASURED = 512  # records of a source
UNCUT = 0.95  # share of the samples that must not be cut for want of image slots
MUCH_PADDING, MANY_EMPTY = 0.2, 0.3  # shares above which a run says so


@dataclasses.dataclass(frozen=True)
class RowFill:
    """How full the rows of a run's first window are.

    Attributes:
      samples, rows: how many.
      padding: share of the positions. empty_slots: share of the image slots.
      fitting: the number of images of a row with which tokens and images run out together.
    """

    samples: int
    rows: int
    padding: float
    empty_slots: float
    fitting: int

    @property
    def waste(self) -> float:
        """1 for as much padding as a run says something of, or as many empty slots."""
        return self.padding / MUCH_PADDING + self.empty_slots / MANY_EMPTY

    def remark(self, data: DataConfig) -> str:
        """What a run says at start of rows that waste much; "" of others."""
        if self.padding <= MUCH_PADDING and self.empty_slots <= MANY_EMPTY:
            return ""
        return f"config.data: {self.describe()}; {self.advice(data)}"

    def describe(self) -> str:
        return (
            f"{self.padding:.1%} of the positions are padding and {self.empty_slots:.1%} of the image slots are empty"
        )

    def advice(self, data: DataConfig) -> str:
        """What would fit better."""
        if self.fitting != data.row_images:
            return f"row_images={self.fitting} would fit better than {data.row_images} for row_tokens={data.row_tokens}"
        return f"larger rows than row_tokens={data.row_tokens}, row_images={data.row_images} would be fuller"


def fitting_images(tokens: int, images: int, row_tokens: int) -> int:
    """Images of a row, at least 1, of data with so many tokens and images."""
    return max(1, round(row_tokens * images / max(tokens, 1)))


def size_rows(data: DataConfig, samples: Samples, queries: int) -> tuple[DataConfig, RowFill]:
    """The config with its row sizes filled in, and how full rows are.

    Args:
      samples: of the same config. queries: Q, embeddings of an image.

    Raises:
      UserError: more padding than `data.max_padding`.
    """
    if data.row_images:
        fill = _first_rows(data, samples)
    else:
        choices = _row_images(data, samples, queries)
        fills = {choice: _first_rows(dataclasses.replace(data, row_images=choice), samples) for choice in choices}
        best = min(fills, key=lambda choice: fills[choice].waste)
        data, fill = dataclasses.replace(data, row_images=best), dataclasses.replace(fills[best], fitting=best)
    if not data.batch_rows:
        shares = data.batch_samples * fill.rows / fill.samples / data.shards
        data = dataclasses.replace(data, batch_rows=max(1, round(shares)) * data.shards)
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
            f"config.data: the first {data.packing_window} records give no sample; expected documents of which "
            f"something fits a row of row_tokens={data.row_tokens}"
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
    """Images of a row worth trying: as many as the mixture shows in its tokens, rounded down and up, and no fewer than
    nearly all samples show."""
    most = data.row_tokens // (queries + 2)
    rates = samples.per_record(data.mixture_unit, most, MEASURED) or {}
    tokens = images = 0.0
    shown: list[tuple[int, float]] = []  # images of a sample, and how often there is one
    for number, (name, entry) in enumerate(data.sources.items()):
        records = samples.measure(number, MEASURED, most)
        rate = entry.weight / rates.get(name, 1.0) / len(records)
        for record in records:
            tokens += rate * sum(map(len, record))
            images += rate * len({image.key for document in record for image in document.images})
            shown += [(len(document.images), rate) for document in record]
    counts, often = (np.array(values) for values in zip(*sorted(shown), strict=True)) if shown else ([0], [1.0])
    share = np.cumsum(often) / np.sum(often)
    nearly_all = int(counts[np.searchsorted(share, UNCUT)])
    exact = data.row_tokens * images / max(tokens, 1.0)
    return sorted({min(max(1, nearly_all, way(exact)), most) for way in (math.floor, math.ceil)})
