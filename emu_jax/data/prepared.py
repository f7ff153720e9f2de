"""Prepared data: folders of ArrayRecord files that `emu-jax prepare` writes and training streams.

    folder/ <name>-<split>.array_record-00000-of-00004   records
            dataset_info.json  features.json              TFDS's: `tfds.builder_from_directory(folder)` reads it
            rejects.jsonl                                 what was left out, and why
            manifest.json                                 counts, a digest a file, settings; written last

A record is a document, as a `tf.train.Example`; neither reading nor writing one needs TensorFlow.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_data_source import ArrayRecordDataSource
from google.protobuf.message import DecodeError
from tensorflow_datasets.proto import tf_example_pb2

from emu_jax.data.document import Text
from emu_jax.errors import UserError

MANIFEST = "manifest.json"
SCHEMA = 1  # counts up when records change
# Kinds whose images are all frames of one video: training shows some of them (`frames.py`).
VIDEOS = ("video", "video_chat")
CHATS = ("chat", "video_chat")
FEATURES = tfds.features.FeaturesDict(
    {
        "key": tfds.features.Text(doc="unique within the data set"),
        "kind": tfds.features.Text(doc="pair, video, web, storyboard, chat or video_chat"),
        "layout": tfds.features.Text(doc="the order of the parts: T the next text, P the next image"),
        "texts": tfds.features.Sequence(tfds.features.Text()),
        "roles": tfds.features.Sequence(tfds.features.Text(), doc="who says each text of a chat; else empty"),
        "images": tfds.features.Sequence(tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg")),
        "scores": tfds.features.Sequence(np.float32, doc="CLIP similarity of each image to its text, or NaN"),
    }
)


@dataclasses.dataclass(frozen=True)
class StoredImage:
    """An encoded image, and its CLIP similarity to its text where the source told it."""

    data: bytes
    score: float | None = None


@dataclasses.dataclass(frozen=True)
class Record:
    """A document as it is stored."""

    key: str
    kind: str
    parts: tuple[Text | StoredImage, ...]

    def serialise(self) -> bytes:
        """The same bytes on every machine and run."""
        texts = [part for part in self.parts if isinstance(part, Text)]
        images = [part for part in self.parts if isinstance(part, StoredImage)]
        strings = {
            "key": [self.key],
            "kind": [self.kind],
            "layout": ["T" if isinstance(part, Text) else "P" for part in self.parts],
            "texts": [text.text for text in texts],
            "roles": [text.role for text in texts],
        }
        strings["layout"] = ["".join(strings["layout"])]
        example = tf_example_pb2.Example()
        fields = example.features.feature
        for name, values in strings.items():
            fields[name].bytes_list.value.extend(value.encode("utf-8", "replace") for value in values)
        fields["images"].bytes_list.value.extend(image.data for image in images)
        scores = [float("nan") if image.score is None else image.score for image in images]
        fields["scores"].float_list.value.extend(scores)
        return example.SerializeToString(deterministic=True)

    @classmethod
    def parse(cls, data: bytes, where: str) -> Record:
        """The inverse of `serialise`; `where` names the record in errors."""
        try:
            fields = tf_example_pb2.Example.FromString(data).features.feature
            texts = zip(fields["texts"].bytes_list.value, fields["roles"].bytes_list.value, strict=True)
            images = zip(fields["images"].bytes_list.value, fields["scores"].float_list.value, strict=True)
            parts: list[Text | StoredImage] = []
            for letter in fields["layout"].bytes_list.value[0]:
                if letter == ord("T"):
                    text, role = next(texts)
                    parts.append(Text(text.decode(), role.decode()))
                else:
                    image, score = next(images)
                    parts.append(StoredImage(image, None if score != score else score))
            key, kind = fields["key"].bytes_list.value[0], fields["kind"].bytes_list.value[0]
            return cls(key.decode(), kind.decode(), tuple(parts))
        except (DecodeError, ValueError, IndexError, StopIteration) as error:
            raise UserError(
                f"{where}: not a record of `emu-jax prepare` ({error or type(error).__name__}); prepare the data again"
            ) from error


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_manifest(folder: Path) -> dict[str, Any]:
    """A prepared folder's manifest.

    Raises:
      UserError: it is no such folder, or its preparation did not end.
    """
    file = folder / MANIFEST
    if not file.is_file():
        raise UserError(
            f"{folder}: no {MANIFEST} in it; expected a folder that `emu-jax prepare` finished (run it again if it "
            "was stopped)"
        )
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        schema = manifest["schema"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: not a manifest of `emu-jax prepare` ({error!r}); prepare the data again") from error
    if schema != SCHEMA:
        raise UserError(f"{file}: records of schema {schema}; this version reads {SCHEMA}, prepare the data again")
    return manifest


class Records:
    """The records of a folder's split, by index.

    Sizes of all files are compared with the manifest at once, so that a cut file is found before training; `verify`
    reads every byte.
    """

    def __init__(self, folder: Path, split: str):
        self.manifest = read_manifest(folder)
        if split not in self.manifest["splits"]:
            raise UserError(f"{folder}: no split {split!r}; it has {', '.join(sorted(self.manifest['splits']))}")
        self._folder, self._split = folder, split
        self._files: dict[str, dict[str, Any]] = self.manifest["splits"][split]["files"]
        for name, file in self._files.items():
            path = folder / name
            size = path.stat().st_size if path.is_file() else None
            if size != file["bytes"]:
                found = "is missing" if size is None else f"has {size:,} bytes"
                raise UserError(
                    f"{path}: {found}, its manifest tells of {file['bytes']:,}; copy it again or prepare the data again"
                )
        self._source: ArrayRecordDataSource | None = None
        self._count = sum(file["records"] for file in self._files.values())
        joined = "".join(file["sha256"] for _, file in sorted(self._files.items()))
        self.fingerprint = hashlib.sha256(joined.encode()).hexdigest()

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Record:
        if self._source is None:  # opened by the process that reads: a forked one must not share file handles
            self._source = ArrayRecordDataSource([str(self._folder / name) for name in sorted(self._files)])
        where = f"{self._folder} {self._split}[{index}]"
        try:
            data = self._source[index]
        except (RuntimeError, ValueError, IndexError) as error:  # what ArrayRecord's C++ raises on damage
            raise UserError(
                f"{where}: damaged ({str(error).partition(chr(10))[0][:120]}); `emu-jax inspect-data --verify` names "
                "the file"
            ) from error
        return Record.parse(data, where)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_source": None}

    def verify(self) -> None:
        """Reads every file whole.

        Raises:
          UserError: a file's digest is not its manifest's.
        """
        for name, file in self._files.items():
            if digest(self._folder / name) != file["sha256"]:
                raise UserError(f"{self._folder / name}: damaged, its SHA-256 is not the manifest's; copy it again")


def file_entry(path: Path, records: int) -> dict[str, Any]:
    """What a manifest tells of a file."""
    return {"records": records, "bytes": path.stat().st_size, "sha256": digest(path)}


def write_manifest(
    folder: Path, name: str, splits: dict[str, dict[str, dict[str, Any]]], told: dict[str, Any]
) -> dict[str, Any]:
    """Completes a folder whose files are written, TFDS's metadata first; returns the manifest.

    Args:
      splits: split -> file name -> `file_entry`. told: what else the manifest says.
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
    manifest = {"schema": SCHEMA, "name": name, **told, "splits": counts}
    partial = folder / (MANIFEST + ".partial")
    partial.write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(folder / MANIFEST)
    return manifest


def shard_name(name: str, split: str, index: int, count: int) -> str:
    """TFDS's name of a file."""
    return f"{name}-{split}.array_record-{index:05d}-of-{count:05d}"
