"""VIST's stories: five photos each, with a sentence for every one.

`sis/val.story-in-sequence.json` (and test), used are
    {"annotations": [[{"story_id", "photo_flickr_id", "worker_arranged_photo_order": 0 to 4, "text"}]]}
with lists of one object. `text` is in lower case, with names replaced by such words as [male]. Photos are
`images/4602435.jpg`. (Fields: from code that reads the files; the files themselves: unverified.)

Some photos cannot be had any more. `missing_photos.txt` may name them, an id a line: their stories are left out, even
where photos are not shown. A missing photo that it does not name is an error.
"""

from __future__ import annotations

import collections
import dataclasses

from emu_jax.errors import UserError
from emu_jax.evaluate.formats.files import Entry, Files
from emu_jax.storage import Path

PHOTOS = 5  # of a story
MISSING = "missing_photos.txt"
TREE = (
    "sis/val.story-in-sequence.json (and sis/test.story-in-sequence.json)",
    "images/4602435.jpg …, here or in images/val/ and images/test/",
    f"{MISSING} (optional: ids of photos that cannot be had, one a line; stories with them are left out)",
)
DESCRIBED = "visionandlanguage.net/VIST, page Dataset (Stories of Images-in-Sequence)"


@dataclasses.dataclass(frozen=True)
class Story:
    """A story; `photos` are ids, with a sentence each."""

    id: str
    photos: tuple[str, ...]
    sentences: tuple[str, ...]


def read_stories(files: Files, split: str) -> list[Story]:
    """A split's stories in the order of their first sentences, without those that have missing photos.

    Raises:
      UserError: a file is not as described above, or a story has not five sentences.
    """
    document = files.document(f"sis/{split}.story-in-sequence.json", f"{split}.story-in-sequence.json")
    found: dict[str, dict[int, Entry]] = collections.defaultdict(dict)
    for entry in document.wrapped("annotations"):
        order = entry.whole("worker_arranged_photo_order")
        if not 0 <= order < PHOTOS or order in (story := found[_number(entry, "story_id")]):
            raise entry.wrong("worker_arranged_photo_order", f"0 to {PHOTOS - 1}, each once in a story")
        story[order] = entry
    stories = []
    for id, entries in found.items():
        if len(entries) < PHOTOS:
            raise UserError(f"{document.path}: story {id} has {len(entries)} sentences; expected {PHOTOS}")
        ordered = [entries[order] for order in range(PHOTOS)]
        photos = tuple(_number(entry, "photo_flickr_id") for entry in ordered)
        stories.append(Story(id, photos, tuple(_sentence(entry) for entry in ordered)))
    missing = _missing(files)
    return [story for story in stories if not missing.intersection(story.photos)]


def _number(entry: Entry, name: str) -> str:
    """An id, which names files."""
    if not ((text := entry.text(name)).isascii() and text.isdigit()):
        raise entry.wrong(name, "a number as a text")
    return text


def _sentence(entry: Entry) -> str:
    if not (text := " ".join(entry.text("text").split())):
        raise entry.wrong("text", "a sentence")
    return text


def _missing(files: Files) -> set[str]:
    path = files.root / MISSING
    if not path.is_file():
        return set()
    try:
        ids = path.read_bytes().decode().split()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); expected ids of photos, one a line") from error
    if wrong := [id for id in ids if not (id.isascii() and id.isdigit())]:
        raise UserError(f"{path}: holds {wrong[0]!a:.60}; expected ids of photos, one a line")
    return set(ids)


def photo(files: Files, id: str) -> Path:
    """A photo's file."""
    folders = ("images", "images/val", "images/test")
    return files.shown(*(f"{folder}/{id}.{ending}" for folder in folders for ending in ("jpg", "png")))
