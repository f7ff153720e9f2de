"""What a server allows; every number a person can send has a bound, and is told where it lies beyond."""

from __future__ import annotations

import dataclasses
import math

from emu_jax.errors import UserError

MEGA = 1_000_000


@dataclasses.dataclass(frozen=True)
class Limits:
    """Bounds of a server.

    Attributes:
      text_slots: texts that are written at the same time. drawing_slots: images drawn at the same time.
      waiting: requests that wait for a slot, of each kind; the next one is refused.
      seconds: a request may take, its waiting included.
      new_tokens: of a text. text_characters: of all texts of a request. messages: of a conversation.
      images: that a request shows, frames of videos included. upload_bytes: of one image or video.
      body_bytes: of a request. body_seconds: that may pass without a byte of a body that is not whole.
      steps: of a sampler. drawings: of a request. guidance: at most, and at least minus as much.
      items: of a document that is continued.
    """

    text_slots: int = 16
    drawing_slots: int = 4
    waiting: int = 128
    seconds: float = 120.0
    new_tokens: int = 1024
    text_characters: int = 100_000
    messages: int = 256
    images: int = 32
    upload_bytes: int = 20 * MEGA
    body_bytes: int = 32 * MEGA
    body_seconds: float = 10.0
    steps: int = 200
    drawings: int = 4
    guidance: float = 50.0
    items: int = 8

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if not getattr(self, field.name) > 0:
                raise UserError(f"limit {field.name}={getattr(self, field.name)}; expected more than 0")

    def check(self, name: str, value: float, least: float, most: float) -> None:
        """Raises LimitError unless a number lies within its bounds."""
        if not (math.isfinite(value) and least <= value <= most):
            raise LimitError(name, f"{name}={value}; expected {least} to {most}")

    def check_text(self, *texts: str) -> None:
        """Raises LimitError unless texts are short enough together."""
        count = sum(map(len, texts))
        if count > self.text_characters:
            raise LimitError("messages", f"the text has {count} characters; expected at most {self.text_characters}")

    def check_images(self, count: int) -> None:
        """Raises LimitError for too many images."""
        if count > self.images:
            raise LimitError("messages", f"the request shows {count} images; expected at most {self.images}")

    def check_upload(self, count: int, where: str) -> None:
        """Raises LimitError for a file of too many bytes."""
        if count > self.upload_bytes:
            raise LimitError(
                where, f"{where} has {count / MEGA:.1f} MB; expected at most {self.upload_bytes / MEGA:g} MB"
            )


class LimitError(UserError):
    """A request beyond a bound; `parameter` names what is too large."""

    def __init__(self, parameter: str, message: str):
        super().__init__(message)
        self.parameter = parameter
