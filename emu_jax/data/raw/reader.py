"""What a reader of raw data yields: documents as they were found, and rejects for whatever it had to leave out.

    path ─ shards ─ read (each shard on any machine) ─ RawDocument | Reject

Readers do not decode or judge still images: `prepare` does that for all of them. They read each shard from front to
back in bounded memory, and never write.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar, Protocol

import numpy as np

from emu_jax.data.document import Text
from emu_jax.data.kinds import KINDS
from emu_jax.errors import UserError, nearest


@dataclasses.dataclass(frozen=True)
class RawImage:
    """An image as found.

    Attributes:
      data: an encoded file; or uint8 [H, W, 3], a frame of a video.
      score: CLIP similarity to its text, if the raw data state it.
    """

    data: bytes | np.ndarray
    score: float | None = None


@dataclasses.dataclass(frozen=True)
class RawDocument:
    """Texts and images in reading order.

    Attributes:
      key: unique within the raw data and the same on every run, such as `00012.tar/000120034`.
      kind: a name in `kinds.KINDS`. The images of a pair or a video come before their text; an image of a web document
        comes before the text that it belongs to.
    """

    key: str
    kind: str
    parts: tuple[Text | RawImage, ...]

    def __post_init__(self):
        if self.kind not in KINDS:
            raise UserError(f"{self.key}: kind {self.kind!r} is unknown; did you mean {nearest(self.kind, KINDS)}?")


@dataclasses.dataclass(frozen=True)
class Reject:
    """Something that was left out.

    Attributes:
      key: names the document, the image (`document#2`) or the shard.
      reason: one word or several joined by `_`; the manifest counts rejects by reason.
      detail: what is wrong, for people.
      whole: whether a document is lost, rather than part of one or something that is not a document.
    """

    key: str
    reason: str
    detail: str
    whole: bool = True


class Reader(Protocol):
    """Reads one format of raw data.

    A reader is a frozen dataclass whose fields, all with defaults, are its settings. Workers get pickled copies of it.

    Attributes:
      about: one line that says what it reads.
      kind: kind of its documents, a name in `kinds.KINDS`, which decides how training shows them.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]
    about: ClassVar[str]
    kind: ClassVar[str]

    def shards(self, path: str) -> list[str]:
        """The pieces that can be read independently, in a fixed order.

        A piece of a file is named by the file, `@` and numbers, as in `a.jsonl@0-100` (`limits.by_file`).

        Raises:
          UserError: `path` holds nothing that this reader reads.
        """
        ...

    def read(self, shard: str) -> Iterator[RawDocument | Reject]:
        """The shard's documents and rejects, in order.

        A truncated shard yields what comes before the break, and a Reject with the reason `cut_shard` that names it.
        """
        ...
