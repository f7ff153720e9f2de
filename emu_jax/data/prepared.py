"""Prepared data: folders of ArrayRecord files that `emu-jax prepare` writes and training streams.

    folder/ <name>-<split>.array_record-00000-of-00004   records
            dataset_info.json  features.json              for TFDS: `tfds.builder_from_directory(folder)` reads it
            rejects.jsonl                                 what was left out, and why
            manifest.json                                 counts, settings and a digest of every file; written last

A record is one document, stored as a `tf.train.Example`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from emu_jax.data.document import Text
from emu_jax.data.kinds import KINDS
from emu_jax.data.record_files import RecordFile, RecordFiles
from emu_jax.data.records import pack_record, unpack_record
from emu_jax.errors import UserError
from emu_jax.storage import Path, list_files, read_json_object, replace_text

MANIFEST = "manifest.json"
SCHEMA = 1  # increases when the format of records changes
FEATURES = tfds.features.FeaturesDict(
    {
        "key": tfds.features.Text(doc="unique within the data set"),
        "kind": tfds.features.Text(doc=f"one of {', '.join(KINDS)}"),
        "layout": tfds.features.Text(doc="the order of the parts: T the next text, P the next image"),
        "texts": tfds.features.Sequence(tfds.features.Text()),
        "roles": tfds.features.Sequence(tfds.features.Text(), doc="the speaker of each text of a chat, or empty"),
        # Without a format: `emu-jax prepare` writes JPEG, the embedded set is WebP. TFDS decodes by content.
        "images": tfds.features.Sequence(tfds.features.Image(shape=(None, None, 3))),
        "scores": tfds.features.Sequence(np.float32, doc="CLIP similarity of each image to its text, or NaN"),
    }
)


@dataclasses.dataclass(frozen=True)
class StoredImage:
    """An encoded image, and its CLIP similarity to its text if the raw data states one."""

    data: bytes
    score: float | None = None


@dataclasses.dataclass(frozen=True)
class Record:
    """A document as it is stored; `kind` is a name in `kinds.KINDS`."""

    key: str
    kind: str
    parts: tuple[Text | StoredImage, ...]

    def serialise(self) -> bytes:
        """The same bytes on every machine and run."""
        texts = [part for part in self.parts if isinstance(part, Text)]
        images = [part for part in self.parts if isinstance(part, StoredImage)]
        layout = "".join("T" if isinstance(part, Text) else "P" for part in self.parts)
        strings = {
            "key": [self.key],
            "kind": [self.kind],
            "layout": [layout],
            "texts": [text.text for text in texts],
            "roles": [text.role for text in texts],
        }
        encoded = {name: [value.encode("utf-8", "replace") for value in values] for name, values in strings.items()}
        scores = [float("nan") if image.score is None else image.score for image in images]
        return pack_record(encoded | {"images": [image.data for image in images]}, {"scores": scores})

    @classmethod
    def parse(cls, data: bytes, where: str) -> Record:
        """The inverse of `serialise`; `where` names the record in errors."""
        try:
            fields = unpack_record(data)
            texts = zip(fields["texts"], fields["roles"], strict=True)
            images = zip(fields["images"], fields["scores"], strict=True)
            parts: list[Text | StoredImage] = []
            for letter in fields["layout"][0]:
                if letter == ord("T"):
                    text, role = next(texts)
                    parts.append(Text(text.decode(), role.decode()))
                else:
                    image, score = next(images)
                    parts.append(StoredImage(image, None if score != score else score))  # NaN means no score
            return cls(fields["key"][0].decode(), fields["kind"][0].decode(), tuple(parts))
        except (ValueError, KeyError, IndexError, StopIteration) as error:
            raise UserError(
                f"{where}: not a record of `emu-jax prepare` ({error or type(error).__name__}); prepare the data again"
            ) from error


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a prepared folder.

    Raises:
      UserError: the folder is not a prepared one, or its preparation did not finish.
    """
    file = folder / MANIFEST
    if not file.is_file():
        raise UserError(
            f"{folder}: no {MANIFEST} in it; expected a folder that `emu-jax prepare` finished (run it again if it "
            "was stopped)"
        )
    manifest = read_json_object(file, "a manifest of `emu-jax prepare`; prepare the data again")
    if (schema := manifest.get("schema")) != SCHEMA:
        raise UserError(f"{file}: records of schema {schema}; this version reads {SCHEMA}, prepare the data again")
    return manifest


class Records:
    """The records of one split of a prepared folder, by index.

    The constructor compares the size of every file with the manifest, which finds truncated files before training;
    `verify` reads every byte.

    Attributes:
      limit: number of records of each raw file that were read (`emu-jax prepare --limit`); 0: all of them.
      fingerprint: changes when any byte of the records does, and with the limit.
    """

    def __init__(self, folder: Path, split: str):
        self.manifest = read_manifest(folder)
        if split not in self.manifest["splits"]:
            raise UserError(f"{folder}: no split {split!r}; it has {', '.join(sorted(self.manifest['splits']))}")
        self.folder, self.split = folder, split
        self._files: dict[str, dict[str, Any]] = self.manifest["splits"][split]["files"]
        present = list_files(folder)
        for name, file in self._files.items():
            size = present[name].size if name in present else None
            if size != file["bytes"]:
                found = "is missing" if size is None else f"has {size:,} bytes"
                raise UserError(
                    f"{folder / name}: {found}, its manifest states {file['bytes']:,}; copy it again or prepare the "
                    "data again"
                )
        self._records = RecordFiles(
            RecordFile(folder / name, file["records"], file["bytes"]) for name, file in sorted(self._files.items())
        )
        joined = "".join(file["sha256"] for _, file in sorted(self._files.items()))
        self.limit: int = self.manifest.get("limit") or 0
        limited = f" limit {self.limit}" if self.limit else ""
        self.fingerprint = hashlib.sha256(f"{joined}{limited}".encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Record:
        return self.read([index])[0]

    def read(self, indices: Sequence[int]) -> list[Record]:
        """The records at `indices`, in their order: one call for many reads them at the same time.

        Raises:
          UserError: a file is missing or damaged.
        """
        found = self._records.read(indices)
        return [
            Record.parse(data, f"{self.folder} {self.split}[{index}]")
            for index, data in zip(indices, found, strict=True)
        ]

    def image_key(self, record: Record, part: int) -> str:
        """The key of the image that is the given part of a record; unique among all sources of a run."""
        return f"{self.fingerprint[:8]}/{record.key}#{part}"

    def verify(self) -> None:
        """Reads every file completely.

        Raises:
          UserError: a file's digest differs from its manifest's.
        """
        for name, file in self._files.items():
            if digest(self.folder / name) != file["sha256"]:
                raise UserError(f"{self.folder / name}: damaged, its SHA-256 is not the manifest's; copy it again")


def file_entry(path: Path, records: int) -> dict[str, Any]:
    """A file's entry in the manifest."""
    return {"records": records, "bytes": path.stat().st_size, "sha256": digest(path)}


def write_manifest(
    folder: Path, name: str, splits: dict[str, dict[str, dict[str, Any]]], details: dict[str, Any]
) -> dict[str, Any]:
    """Completes a folder whose record files are written, TFDS's metadata first; returns the manifest.

    Args:
      splits: split -> file name -> `file_entry`.
      details: further entries of the manifest. `settings.images.image_size` is the largest side that images were
        reduced to, in pixels, or None if they have the size of their originals.
    """
    template = tfds.core.ShardedFileTemplate(data_dir=folder, dataset_name=name, filetype_suffix="array_record")
    infos = [
        tfds.core.SplitInfo(
            name=split,
            shard_lengths=[files[file]["records"] for file in sorted(files)],
            num_bytes=sum(file["bytes"] for file in files.values()),
            filename_template=template.replace(split=split),
        )
        for split, files in splits.items()
    ]
    tfds.folder_dataset.write_metadata(
        data_dir=folder, features=FEATURES, split_infos=infos, check_data=False, description=f"{name}, for emu_jax"
    )
    counts = {
        split: {"records": sum(file["records"] for file in files.values()), "files": dict(sorted(files.items()))}
        for split, files in splits.items()
    }
    manifest = {"schema": SCHEMA, "name": name, **details, "splits": counts}
    replace_text(folder / MANIFEST, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
    return manifest


def shard_name(name: str, split: str, index: int, count: int) -> str:
    """A record file's name, as TFDS expects it."""
    return f"{name}-{split}.array_record-{index:05d}-of-{count:05d}"
