"""The kinds of documents, in one table: how each is cleaned by `emu-jax prepare` and shown to training.

pair         an image and its text, in either order
video        frames of one video and their text, in either order
web          an interleaved page
storyboard   a video's frames and subtitles, interleaved
chat         turns of a conversation, with or without images
video_chat   turns of a conversation about one video, whose frames come first
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Kind:
    """How documents of one kind are treated.

    Attributes:
      unique: what must not occur twice in a data set: "documents" (all images of a document, taken together), "images"
        (each image on its own) or "" (anything may; each chat about an image asks something else).
      optional_images: whether the document is still worth keeping when some of its images are unusable.
      one_video: whether all images are frames of one video, of which training shows some (`frames.FrameSampling`).
      either_order: whether the images may come before or after the text (`sources.PairOrder`). Such a document is
        stored with its images first.
      subsequences: whether it may be cut into MMC4's two sequences (`sources.subsequences`).
      window: whether training reads one window that begins at random where a document is longer than a row; the pieces
        of other kinds are all read. Videos of several frames have a window too (`sources.PairOrder.documents`).
    """

    unique: str = "documents"
    optional_images: bool = False
    one_video: bool = False
    either_order: bool = False
    subsequences: bool = False
    window: bool = False


KINDS = {
    "pair": Kind(either_order=True),
    "video": Kind(either_order=True, one_video=True),
    "web": Kind(unique="images", optional_images=True, subsequences=True),
    "storyboard": Kind(optional_images=True, window=True),
    "chat": Kind(unique=""),
    "video_chat": Kind(unique="", one_video=True),
}
