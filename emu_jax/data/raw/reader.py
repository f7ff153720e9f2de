"""What a reader of raw data gives: documents as they were found, and what it had to leave out.

    path ─ shards ─ read, each on any machine ─ RawDocument | Reject

Readers neither decode nor judge still images: `prepare` does that for all of them. They read shards front to back,
in bounded memory, and never write.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar, Protocol

import numpy as np

from emu_jax.data.document import Text

KINDS = ("pair", "video", "web", "storyboard", "chat", "video_chat")


@dataclasses.dataclass(frozen=True)
class RawImage:
    """An image as found.

    Attributes:
      data: the encoded file; or uint8 [H, W, 3], a frame of a video.
      score: its CLIP similarity to its text, where the data tell.
    """

    data: bytes | np.ndarray
    score: float | None = None


@dataclasses.dataclass(frozen=True)
class RawDocument:
    """Texts and images in order.

    Attributes:
      key: unique within its source and the same on every run, as `00012.tar/000120034`.
      kind: of `KINDS`. A pair's image and a video's frames stand before their text, and take either side of it when
        they are streamed. An image of a web document stands before the text it belongs to. All images of a video and
        of a video_chat are frames of one video.
    """

    key: str
    kind: str
    parts: tuple[Text | RawImage, ...]


@dataclasses.dataclass(frozen=True)
class Reject:
    """Something that was left out.

    Attributes:
      key: of the document, the image (`document#2`) or the shard.
      reason: one word or a few joined by `_`, counted in the manifest.
      detail: what is wrong, for a person.
      whole: whether a document is lost; else a part of one, or what is not a document.
    """

    key: str
    reason: str
    detail: str
    whole: bool = True


class Reader(Protocol):
    """One kind of raw data. Readers are frozen dataclasses of their settings: workers receive pickled copies."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def shards(self, path: str) -> list[str]:
        """What can be read independently, in a fixed order.

        Raises:
          UserError: there is nothing of this kind at `path`.
        """
        ...

    def read(self, shard: str) -> Iterator[RawDocument | Reject]:
        """The shard's documents and rejects, in order. A shard that breaks off gives what stands before, and a Reject
        with the reason `cut_shard` that names it."""
        ...
