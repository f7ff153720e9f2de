"""Limits of a server: every number in a request has bounds, and an error that names them."""

from __future__ import annotations

import dataclasses

from emu_jax.errors import UserError

MEGA = 1_000_000
MIN_DECODE_BYTES = 400 * MEGA  # a process that decodes has 150 MB of code and libraries


@dataclasses.dataclass(frozen=True)
class Limits:
    """Maxima of a server.

    Attributes:
      text_slots, drawing_slots: texts, and images, generated at the same time.
      waiting: requests of each kind that wait for a slot; further ones are refused.
      seconds: time of a request, waiting included.
      new_tokens: new tokens of a text.
      text_characters: characters of all texts of a request.
      messages: messages of a conversation.
      images: images shown in a request, frames of videos included.
      upload_bytes: size of one image or video.
      body_bytes: size of a request's body.
      body_seconds: pause between two pieces of a body. upload_seconds: time of a body.
      head_seconds: time of a request's first line and headers.
      answer_seconds: time in which a client has to read some of its answer.
      half_closed_seconds: time in which the answer begins for a client that has closed its side of the connection.
      connections: open at the same time; above it, one that sends no request is closed.
      decoders: requests whose images are decoded at the same time, each by a process.
      decode_seconds: time to decode all images of a request.
      decode_bytes: memory of a process that decodes, where the system can bound it (Linux).
      steps: sampling steps. drawings: images drawn for one request.
      choices: texts written, or embeddings computed, for one request.
      guidance: absolute guidance scale.
      items: new items of a document.
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
    upload_seconds: float = 120.0
    head_seconds: float = 10.0
    answer_seconds: float = 30.0
    half_closed_seconds: float = 5.0
    connections: int = 512
    decoders: int = 2
    decode_seconds: float = 30.0
    decode_bytes: int = 2048 * MEGA
    steps: int = 200
    drawings: int = 4
    choices: int = 64
    guidance: float = 50.0
    items: int = 8

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if not getattr(self, field.name) > 0:
                raise UserError(f"limit {field.name}={getattr(self, field.name)}; expected more than 0")

        if self.decode_bytes < MIN_DECODE_BYTES:
            raise UserError(
                f"limit decode_bytes={self.decode_bytes}; expected at least {MIN_DECODE_BYTES} "
                f"(--decode-megabytes {MIN_DECODE_BYTES // MEGA})"
            )

    def check(self, name: str, value: float, least: float, most: float) -> None:
        """Raises LimitError unless a number is within its bounds."""
        if not least <= value <= most:  # NaN is neither
            raise LimitError(name, f"{name}={value}; expected {least} to {most}")

    def check_text(self, *texts: str) -> None:
        """Raises UserError if the texts together are too long."""
        count = sum(map(len, texts))
        if count > self.text_characters:
            raise UserError(f"the text has {count} characters; expected at most {self.text_characters}")

    def check_images(self, count: int) -> None:
        """Raises UserError for too many images."""
        if count > self.images:
            raise UserError(f"the request shows {count} images; expected at most {self.images}")

    def check_upload(self, count: int, where: str) -> None:
        """Raises LimitError for a file of too many bytes."""
        if count > self.upload_bytes:
            raise LimitError(
                where, f"{where} has {count / MEGA:.1f} MB; expected at most {self.upload_bytes / MEGA:g} MB"
            )


class LimitError(UserError):
    """A request beyond a limit; `parameter` names the field."""

    def __init__(self, parameter: str, message: str):
        super().__init__(message)
        self.parameter = parameter
