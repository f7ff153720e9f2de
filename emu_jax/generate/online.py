"""The visual decoder's training examples, made while it trains (`config.online`): nothing is stored.

At the published size precomputed examples take 0.4 to 1.4 MB an image (`data/latents.py`). Here the frozen model and
the VAE run again whenever an image is drawn, on this process's first device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from emu_jax.data.examples import TRIES, Drawn
from emu_jax.data.images import FITS, ImageError
from emu_jax.data.latents import LatentExample
from emu_jax.errors import UserError, check_fields
from emu_jax.generate.conditions import Conditions, ToDraw, images_to_draw, open_images
from emu_jax.storage import as_path


@dataclasses.dataclass(frozen=True)
class OnlineConfig:
    """`config.online`.

    Attributes:
      model: the frozen model, as `Emu.load` takes it; empty: `config.data.source` is a folder of `emu-jax precompute`,
        otherwise it holds documents.
      vae: as in `conditions.Conditions`.
      image_size, fit, min_side: as in `precompute.PrecomputeConfig`.
    """

    model: str = ""
    vae: str = ""
    image_size: int = 0
    fit: str = "crop"
    min_side: int = 0

    def __post_init__(self):
        if bool(self.model) != bool(self.vae):
            raise UserError(
                f"config.online.model={self.model!r}, config.online.vae={self.vae!r}; expected both, or neither"
            )
        if self.fit not in FITS:
            raise UserError(f"config.online.fit={self.fit!r} is unknown; choose one of {', '.join(FITS)}")
        if self.image_size < 0 or self.min_side < 0:
            raise UserError(
                f"config.online.image_size={self.image_size}, config.online.min_side={self.min_side}; expected at "
                "least 0"
            )

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> OnlineConfig:
        check_fields(cls, "config.online", fields)
        return cls(**dict(fields))

    def load(self, *, generated: bool, encoded: bool) -> Conditions:
        """The model and the VAE.

        Args:
          generated, encoded: as in `Conditions`.
        """
        parts, size = (as_path(self.model), as_path(self.vae)), self.image_size or None
        return Conditions(*parts, image_size=size, generated=generated, encoded=encoded)


class OnlineExamples:
    """A source (`examples.ExampleSource`) with an example for each record.

    Of several images of a record one is drawn at random; a record without any gives the next one's.

    Args:
      conditions: the model and the VAE; several sources share them.
      batch: number of examples that are made together.
      max_faults: share of the lines of a .jsonl file that may hold no document; above 0, the first images may be
        unreadable.

    Attributes:
      remark: a line about what the source leaves out, or "".
      unconditional: [Q, D], embeddings for the empty prompt.
      latent_shape: h, w, C. condition_shape: Q, D.

    Raises:
      UserError: there is no such source, or none of its images can be drawn.
    """

    def __init__(
        self,
        conditions: Conditions,
        config: OnlineConfig,
        source: str,
        split: str,
        *,
        batch: int,
        max_faults: float = 0.0,
    ):
        self._conditions = conditions
        self._source = open_images(source, split, self._conditions.size, config.fit, max_faults)
        self._config, self._batch, self.name, self.remark = config, batch, source, self._source.remark
        images = f"{self._source.fingerprint} {self._source.images_fingerprint}"
        self.fingerprint = f"online 1 {images} {self._conditions.fingerprint} {config.fit} {config.min_side}"
        self.unconditional = self._conditions.unconditional
        first = self._readable(TRIES if max_faults else 1)
        self.latent_shape, self.condition_shape = first.mean.shape, first.condition.shape

    def _readable(self, tries: int) -> LatentExample:
        """The first example; with more tries, of those whose images can be read."""
        for index in range(min(tries, len(self))):
            (record,) = self._source.read([index])
            try:
                (first,) = self._conditions.examples([self._find(index, record, np.random.default_rng(0))], 1)
                return first
            except ImageError:
                if index + 1 == min(tries, len(self)):
                    raise
        raise AssertionError(f"{self.name} is empty")  # which no source is

    def __len__(self) -> int:
        return len(self._source)

    def key(self, index: int) -> str:
        return self._source.key(index)

    def _find(self, index: int, record: Any, rng: np.random.Generator) -> ToDraw:
        for step in range(len(self)):
            place = (index + step) % len(self)
            if step:
                (record,) = self._source.read([place])
            found = [
                one
                for one in images_to_draw(self._source, record, np.random.default_rng(place))
                if one.has_side(self._config.min_side)
            ]
            if found:
                return found[rng.integers(len(found)) if len(found) > 1 else 0]
        raise UserError(
            f"config.data.source {self.name}: no image has a short text before it and {self._config.min_side} pixels "
            "a side; nothing can be drawn"
        )

    def examples(self, drawn: Sequence[Drawn]) -> list[dict[str, np.ndarray]]:
        records = self._source.read([index for index, _ in drawn])
        found = [self._find(index, record, rng) for record, (index, rng) in zip(records, drawn, strict=True)]
        made = self._conditions.examples(found, self._batch)
        return [example.sampled(rng) for example, (_, rng) in zip(made, drawn, strict=True)]
