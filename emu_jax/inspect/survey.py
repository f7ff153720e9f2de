"""Counts over a run's first batches: documents, tokens and images of every source, and how full rows are.

In: a task's documents (`PackedDocuments`). Out: a `Survey`, whose tables and remarks are strings to print and to draw.
Batches come from the run's own `Pipeline`: the same ones in the same order.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np

from emu_jax.data.config import DataConfig
from emu_jax.data.packing import CONTINUES, CUT
from emu_jax.data.row_sizes import fitting_images
from emu_jax.data.sources import Source
from emu_jax.data.tokenizer import Tokenizer
from emu_jax.errors import UserError
from emu_jax.train.tasks.interleaved import PackedDocuments

SAMPLED_RECORDS = 256  # records of a source whose documents are counted
PERCENTILES = (10, 50, 90, 100)

Table = list[list[str]]  # the first line is the header


@dataclasses.dataclass(frozen=True)
class Documents:
    """D packed documents in order; every piece of a cut document counts as one.

    Attributes:
      sources: index of the source, int [D].
      tokens, images: counts, int [D].
      continues: whether this is a later piece, bool [D].
      cut: whether the document ends before its end, bool [D].
      text_targets, visual_targets: counts of positions that are classified and regressed, int [D].
      learnt_ends: count of </s> among the text targets, int [D].
    """

    sources: np.ndarray
    tokens: np.ndarray
    images: np.ndarray
    continues: np.ndarray
    cut: np.ndarray
    text_targets: np.ndarray
    visual_targets: np.ndarray
    learnt_ends: np.ndarray


@dataclasses.dataclass(frozen=True)
class PackedRow:
    """A row of a batch: the fields of `models.emu.Batch` without their leading axis.

    Attributes:
      cuts: at each document's first position, how the document was cut (`packing.build_row`), int32 [S].
    """

    tokens: np.ndarray
    segments: np.ndarray
    slots: np.ndarray
    source_ids: np.ndarray
    text_weights: np.ndarray
    visual_weights: np.ndarray
    cuts: np.ndarray
    images: np.ndarray


@dataclasses.dataclass(frozen=True)
class Survey:
    """What `batches` batches hold.

    Attributes:
      ended: whether the stream ended with them.
      records, documents_a_record, faults: figures of every source, by name and in order.
      left_out: what sources leave out before they are read; "" if nothing.
      row_tokens, row_images: tokens and image slots in use of every row, int [batches * B].
      rows: the first rows.
    """

    data: DataConfig
    tokenizer: Tokenizer
    queries: int
    image_size: int
    batches: int
    ended: bool
    records: Mapping[str, int]
    documents_a_record: Mapping[str, float]
    faults: Mapping[str, int]
    left_out: str
    documents: Documents
    row_tokens: np.ndarray
    row_images: np.ndarray
    rows: list[PackedRow]

    @property
    def names(self) -> list[str]:
        """The names of the sources, by index."""
        return list(self.records)

    @property
    def title(self) -> str:
        """One line that says what was counted."""
        d = self.data
        end = ", where the stream ends" if self.ended else ""
        return (
            f"{self.batches:,} batches of {d.batch_rows:,} rows of {d.row_tokens:,} tokens and {d.row_images:,} "
            f"images ({self.image_size} x {self.image_size} pixels, {self.queries} tokens each){end}"
        )

    def source_table(self) -> Table:
        """Counts and shares of each source."""
        d = self.documents
        table = [["source", "records", "weight", "documents", "images", "tokens", "share", "epochs/1,000 batches"]]
        for number, name in enumerate(self.names):
            mine = d.sources == number
            tokens, weight = d.tokens[mine].sum(), self.data.sources[name].weight
            figures = [f"{mine.sum():,}", f"{d.images[mine].sum():,}", f"{tokens:,}"]
            share = f"{tokens / d.tokens.sum():.1%}"
            table.append([name, f"{self.records[name]:,}", f"{weight:g}", *figures, share, f"{self._epochs(name):.3g}"])
        if len(self.names) > 1:
            sums = [f"{len(d.tokens):,}", f"{d.images.sum():,}", f"{d.tokens.sum():,}"]
            table.append(["all", f"{sum(self.records.values()):,}", "", *sums, "100.0%", ""])
        return table

    def _epochs(self, name: str) -> float:
        """Passes over a source in 1,000 batches: its documents, counted as records, over its records."""
        d = self.documents
        whole = ((d.sources == self.names.index(name)) & ~d.continues).sum()
        return 1000 * whole / self.batches / self.documents_a_record[name] / self.records[name]

    def document_table(self) -> Table:
        """Means and percentiles of tokens and images per document."""
        d = self.documents
        table = [["a document's", "mean", *(f"{p}%" for p in PERCENTILES[:-1]), "most"]]
        for what, values in (("tokens", d.tokens), ("images", d.images)):
            for number, name in enumerate(self.names):
                mine = values[d.sources == number]
                if len(mine):
                    marks = np.percentile(mine, PERCENTILES, method="inverted_cdf")
                    table.append([f"{what}, {name}", f"{mine.mean():.1f}", *(f"{mark:,}" for mark in marks)])
        return table

    def remarks(self) -> list[tuple[str, str]]:
        """Other findings: pairs of a name and a text."""
        rows = len(self.row_tokens)
        positions, slots = rows * self.data.row_tokens, rows * self.data.row_images
        cut = int(self.documents.continues.sum())
        faults = {name: count for name, count in self.faults.items() if count}
        by_source = "; ".join(f"{name} {count:,}" for name, count in faults.items())
        return [
            ("padding", f"{1 - self.row_tokens.sum() / positions:.1%} of {positions:,} positions"),
            ("empty image slots", f"{1 - self.row_images.sum() / slots:.1%} of {slots:,}"),
            ("split documents", f"{cut:,} cuts through documents that are longer than a row"),
            (
                "faulty documents",
                f"{sum(faults.values()):,}" + (f", left out of the loss: {by_source}" if faults else ""),
            ),
            *([("left out", self.left_out)] if self.left_out else []),
            ("row_images", self.advice()),
        ]

    def counts(self) -> dict[str, Any]:
        """The counts over all sources and of each one, JSON-serialisable.

        `padding` and `empty_image_slots` are shares. `document_ends` counts documents that are not cut, `learnt_eos`
        the </s> among the labels: as many, and in chats one more for each earlier answer. `cut_documents` counts
        documents that a cut ends early, whether the rest follows as a later piece or is dropped.
        """
        d = self.documents
        rows = len(self.row_tokens)

        def of(mine: np.ndarray) -> dict[str, int]:
            return {
                "samples": int(mine.sum()),
                "tokens": int(d.tokens[mine].sum()),
                "images": int(d.images[mine].sum()),
                "text_targets": int(d.text_targets[mine].sum()),
                "visual_targets": int(d.visual_targets[mine].sum()),
                "learnt_eos": int(d.learnt_ends[mine].sum()),
                "document_ends": int((~d.cut[mine]).sum()),
                "cut_documents": int((d.cut & ~d.continues)[mine].sum()),
                "predicted_documents": int(((d.visual_targets > 0) & (d.images > 0))[mine].sum()),
            }

        return {
            "batches": self.batches,
            "rows": rows,
            "row_tokens": self.data.row_tokens,
            "row_images": self.data.row_images,
            "padding": float(1 - self.row_tokens.sum() / (rows * self.data.row_tokens)),
            "empty_image_slots": float(1 - self.row_images.sum() / (rows * self.data.row_images)),
            **of(np.ones(len(d.tokens), bool)),
            "sources": {name: of(d.sources == number) for number, name in enumerate(self.names)},
        }

    def advice(self) -> str:
        """The number of image slots with which a row's tokens and slots would run out together."""
        images, tokens = int(self.row_images.sum()), int(self.row_tokens.sum())
        now, length = self.data.row_images, self.data.row_tokens
        if not images:
            return f"there was no image; config.data.row_images={now} could be 1"
        best = fitting_images(tokens, images, length)
        verdict = "fits" if best == now else f"would fit better than {now}"
        most = int(self.documents.images.max())
        cut = f"; it would cut documents of more than {best} (up to {most} were seen)" if most > best else ""
        ratio = f"an image every {tokens / images:.1f} tokens"
        return f"{ratio}: config.data.row_images={best} {verdict} for row_tokens={length}{cut}"


def survey(packed: PackedDocuments, *, batches: int, rows: int = 0) -> Survey:
    """Reads up to `batches` batches and keeps the first `rows` rows.

    Raises:
      UserError: a source cannot be read, or all of them do not fill a batch.
    """
    queries, image_size, tokenizer = packed.model.causal.queries, packed.image_size, packed.tokenizer
    opened = packed.data.open(image_size)
    pipeline = packed.pipeline()
    data = pipeline.data
    documents: list[Documents] = []
    row_tokens: list[np.ndarray] = []
    row_images: list[np.ndarray] = []
    shown: list[PackedRow] = []
    try:
        for batch in itertools.islice(pipeline, batches):
            batch = {"source_ids": np.zeros_like(batch["tokens"])} | batch  # which a single source goes without
            batch["cuts"] = pipeline.cuts
            documents.append(count_documents(batch, queries, tokenizer.eos_id))
            row_tokens.append((batch["segments"] > 0).sum(1))
            row_images.append(batch["slots"].max(1) + 1)  # slots are taken from the first on
            for row in range(min(rows - len(shown), data.batch_rows)):
                shown.append(PackedRow(**{name: values[row].copy() for name, values in batch.items()}))
        faults = {name: pipeline.count(f"faults/{name}") for name in pipeline.sources}
        left_out = "; ".join(pipeline.remarks)
    finally:
        pipeline.close()
    if not documents:
        raise UserError(
            f"config.data: all sources together do not fill a batch of config.data.batch_rows={data.batch_rows} rows; "
            "set fewer rows, or more epochs of the sources"
        )
    return Survey(
        data=data,
        tokenizer=tokenizer,
        queries=queries,
        image_size=image_size,
        batches=len(documents),
        ended=len(documents) < batches,
        records={name: len(source) for name, source in opened.items()},
        documents_a_record={name: _documents_a_record(source, data.seed) for name, source in opened.items()},
        faults=faults,
        left_out=left_out,
        documents=Documents(
            *(
                np.concatenate([getattr(found, field.name) for found in documents])
                for field in dataclasses.fields(Documents)
            )
        ),
        row_tokens=np.concatenate(row_tokens),
        row_images=np.concatenate(row_images),
        rows=shown,
    )


def count_documents(batch: Mapping[str, np.ndarray], queries: int, eos: int) -> Documents:
    """The documents of a batch [B, S], row by row; `eos` is the id of </s>."""
    live = batch["segments"].ravel() > 0
    first = (np.diff(batch["segments"], prepend=0, axis=1) > 0).ravel()
    number = np.cumsum(first) - 1  # of the document that a position is in

    def count(positions: np.ndarray) -> np.ndarray:
        return np.bincount(number[live & positions.ravel()], minlength=int(first.sum()))

    cuts, learnt = batch["cuts"].ravel()[first], batch["text_weights"] > 0
    return Documents(
        sources=batch["source_ids"].ravel()[first],
        tokens=count(live),
        images=count(batch["slots"] >= 0) // queries,
        continues=(cuts & CONTINUES) > 0,
        cut=(cuts & CUT) > 0,
        text_targets=count(learnt),
        visual_targets=count(batch["visual_weights"] > 0),
        learnt_ends=count(learnt & (batch["tokens"] == eos)),
    )


def _documents_a_record(source: Source, seed: int) -> float:
    """Mean over records that are spread evenly over the source; no image is decoded."""
    rng = np.random.default_rng(seed)
    sample = np.unique(np.linspace(0, len(source) - 1, min(len(source), SAMPLED_RECORDS)).astype(int))
    return float(np.mean([len(source.documents(record, rng)) for record in source.read(sample.tolist())]))
