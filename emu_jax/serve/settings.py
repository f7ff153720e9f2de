"""Settings of one text or image, and the limits that a server sets them."""

from __future__ import annotations

import dataclasses

from emu_jax.errors import UserError
from emu_jax.generate.decoder import SEEDS, Drawing, consecutive_seed
from emu_jax.generate.model import Emu
from emu_jax.generate.samplers import sampler_names
from emu_jax.serve.limits import LimitError, Limits

MAX_STOPS, MAX_STOP_CHARACTERS = 16, 200  # stop strings of a text, and their length


@dataclasses.dataclass(frozen=True)
class TextSettings:
    """Decoding settings of a text; see `Emu.generate_text`.

    Attributes:
      max_new_tokens: at most so many; fewer where the context or the server's limit ends first, as clients that ask
        for thousands expect. None: 256.
      until_image: end at [IMG] even if the model has not learnt to begin images (`Emu.ends`).
      stop: strings before which the text ends.
      scored: whether the completion has the log p of its tokens.
    """

    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_length: int = 1
    seed: int = 0
    until_image: bool = False
    stop: tuple[str, ...] = ()
    scored: bool = False

    def following(self, number: int) -> TextSettings:
        """The settings of text `number` of several: with the next seeds."""
        return dataclasses.replace(self, seed=consecutive_seed(self.seed, number))

    def check(self, limits: Limits) -> None:
        """Raises UserError for settings that cannot work or exceed the limits."""
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise LimitError("max_tokens", f"max_tokens={self.max_new_tokens}; expected 1 or more")
        limits.check("temperature", self.temperature, 0, 100)
        limits.check("top_k", self.top_k, 0, 1_000_000)
        limits.check("min_length", self.min_length, 0, limits.new_tokens)
        limits.check("seed", self.seed, 0, SEEDS - 1)
        if not 0 < self.top_p <= 1:
            raise LimitError("top_p", f"top_p={self.top_p}; expected more than 0, and at most 1")
        if len(self.stop) > MAX_STOPS or any(len(stop) > MAX_STOP_CHARACTERS for stop in self.stop):
            raise LimitError(
                "stop", f"stop: expected at most {MAX_STOPS} texts of at most {MAX_STOP_CHARACTERS} characters each"
            )


@dataclasses.dataclass(frozen=True)
class DrawSettings:
    """Sampling settings of an image; see `Emu.generate_image`."""

    sampler: str = "pndm"
    steps: int = 50
    guidance: float = 7.5
    seed: int = 0

    def following(self, number: int) -> DrawSettings:
        """The settings of image `number` of several: with the next seeds."""
        return dataclasses.replace(self, seed=consecutive_seed(self.seed, number))

    def check(self, limits: Limits, model: Emu) -> None:
        """Raises UserError for settings that cannot work or exceed the limits."""
        limits.check("steps", self.steps, 1, limits.steps)
        limits.check("guidance", self.guidance, -limits.guidance, limits.guidance)
        limits.check("seed", self.seed, 0, SEEDS - 1)
        try:
            model.check_drawing(Drawing(self.sampler, self.steps, self.guidance))
        except UserError as error:
            if model.decoder is None:
                raise
            raise LimitError("steps" if self.sampler in sampler_names() else "sampler", str(error)) from None
