"""`config.data`: the sources of a run, how they are mixed, and the shape of its batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from emu_jax.data.frames import FRAMES, FrameSampling
from emu_jax.data.mixture import UNITS, SourceConfig
from emu_jax.data.sequence import CHAT_CUTS
from emu_jax.data.sources import IMAGE_FINGERPRINTS, PairOrder, Source, open_source
from emu_jax.errors import UserError, check_fields


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """`config.data`.

    Attributes:
      source, split: a folder of `emu-jax prepare` and its split, `fluent_emoji` and one of its splits, or a .jsonl file
        (its split is ignored).
      mixture: several sources by name, with their weights; used if `source` is empty.
      mixture_unit: unit of these weights: samples (packed sequences), records, or tokens.
      predicted_share: share of documents whose images are regression targets; images of the others are only inputs.
        With 1 and without `model.stop_target_inputs`, as published, every image is both.
      chat_cut: how a chat that is longer than a row continues: "turn" repeats the system message and the images so far
        before the next question, "drop" leaves the rest out.
      row_tokens, row_images, batch_rows: S, I and B of a batch over all hosts. With row_images=0, I is measured at
        start so that it fits the documents.
      batch_samples: mean number of samples per batch, from which B follows at start; used if batch_rows is 0.
      max_padding: share of padding above which a run is refused; 1 never refuses.
      packing_window: records that are packed together; more of them fill rows better and need more memory.
      shards: K, which must divide batch_rows. Another number gives another stream. 0 makes one shard for each of the
        parts over which the mesh spreads a batch's rows, so that every record is read by one host; the run records it.
      workers: processes that prepare the rows of a shard; 0 is one thread. Another number gives another stream.
      max_faults: share of a source's documents that may have unreadable images, and of a .jsonl file's lines that may
        hold no document. Such lines are left out; such documents are left out of the loss.
      image_fingerprint: how a resumed run recognises that the images of a .jsonl file were replaced: by their "stat"
        (size and time of change), or by their "content", which reads all of them at every start.
      video_frames, frame_sampling: number of a prepared video's frames that a sample shows, and their choice
        (`FrameSampling`).
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
    image_fingerprint: str = "stat"

    def __post_init__(self):
        _ = self.frames  # raises if its settings are wrong
        # Grain cannot count the windows of an endless stream if each is one record, so a window has at least 2.
        for name, least in (("row_tokens", 1), ("packing_window", 2), ("shards", 0)):
            if getattr(self, name) < least:
                raise UserError(f"config.data.{name}={getattr(self, name)}; expected at least {least}")
        if self.row_images < 0:
            raise UserError(
                f"config.data.row_images={self.row_images}; expected 0, which measures and chooses, or more"
            )
        if min(self.batch_rows, self.batch_samples) < 0 or not self.batch_rows + self.batch_samples:
            raise UserError(
                f"config.data.batch_rows={self.batch_rows}, batch_samples={self.batch_samples}; expected rows per "
                "batch, or 0 and the mean number of samples per batch"
            )
        if self.batch_rows % max(self.shards, 1):
            raise UserError(
                f"config.data.batch_rows={self.batch_rows} does not divide by config.data.shards={self.shards}; "
                "expected the same number of rows from every shard"
            )
        for name in ("max_faults", "predicted_share", "max_padding"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"config.data.{name}={getattr(self, name)}; expected a share of 0 to 1")
        for name, known in (
            ("mixture_unit", UNITS),
            ("chat_cut", CHAT_CUTS),
            ("image_fingerprint", IMAGE_FINGERPRINTS),
        ):
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
        """The choice of a video's frames."""
        return FrameSampling(self.video_frames, self.frame_sampling)

    @property
    def sources(self) -> dict[str, SourceConfig]:
        """All sources by name. A single source has its own path as its name."""
        entries = dict(self.mixture) or {self.source: SourceConfig(self.source)}
        return {name: dataclasses.replace(entry, split=entry.split or self.split) for name, entry in entries.items()}

    def open(self, image_size: int) -> dict[str, Source]:
        """Opens all sources, by name.

        Args:
          image_size: pixels of a side of the model's images.

        Raises:
          UserError: a source is not set, or does not exist.
        """
        for name, entry in self.mixture.items():
            if not entry.source:
                raise UserError(
                    f"config.data.mixture.{name}.source is empty; name a folder of `emu-jax prepare`, set "
                    f"config.data.mixture.{name}.weight=0 to leave it out, or name one source in config.data.source"
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
                image_fingerprint=self.image_fingerprint,
                max_faults=self.max_faults,
            )
            for name, s in self.sources.items()
        }
