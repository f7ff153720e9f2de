"""`emu-jax prepare`: raw data of one kind -> a folder of records (`prepared.py`), by Apache Beam.

    shards ─ read ─┬─ images judged, stored once ─┬─ duplicates out ─ grouped by hash of the key ─ ArrayRecord files
                   └─ rejects ──────────────────────┴──────── rejects ─ rejects.jsonl

The same pipeline runs in this process, in several here, or on Dataflow, Flink or Spark; input and output are folders
that every worker sees. The same input and settings give the same bytes, however many workers there are. That is why
records are written here and not by a TFDS builder, whose serialised bytes differ from run to run; TFDS reads what is
written.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import logging
import math
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from emu_jax.data.document import Text
from emu_jax.data.images import ImageError, Recoding
from emu_jax.data.prepared import CHATS, MANIFEST, Record, StoredImage, file_entry, shard_name, write_manifest
from emu_jax.data.raw.reader import RawDocument, Reader, Reject
from emu_jax.data.records import write_records
from emu_jax.errors import UserError

SHARD_BYTES = 256 << 20
REJECTS_A_FILE = 1_000_000
BEGUN = "begun.partial"  # there from a preparation's beginning to its end
ENTRIES, REASONS = "entries.partial", "reasons.partial"  # what workers tell the process that began
# Left out by rule. Every other reason is a fault of the data, and too many faults stop a preparation.
RULES = frozenset(
    {
        "decoration",
        "duplicate",
        "extreme_aspect",
        "low_similarity",
        "no_image",
        "no_text",
        "text_too_long",
        "too_small",
    }
)
# What web documents lose without a fault: images that their server no longer had. A document lost by it is one.
PARTS_MISSING = frozenset({"missing_image", "outside", "no_similarity"})


@dataclasses.dataclass(frozen=True)
class PrepareConfig:
    """How a source is prepared.

    Attributes:
      name, split: of the data set, as TFDS calls it. shards: of its files; 0: about 256 MB each.
      max_faults: share of the documents that may be faulty.
      runner, workers, beam: Beam's runner; processes of the local one; further arguments of Beam.
    """

    name: str
    split: str = "train"
    shards: int = 0
    max_faults: float = 0.02
    recoding: Recoding = dataclasses.field(default_factory=Recoding)
    runner: str = "DirectRunner"
    workers: int = 1
    beam: str = ""

    def __post_init__(self):
        if not self.name.isidentifier() or not self.split.isidentifier():
            raise UserError(f"name {self.name!r}, split {self.split!r}; expected letters, digits and underscores")
        if self.shards < 0 or self.workers < 1 or not 0 <= self.max_faults <= 1:
            raise UserError(
                f"shards {self.shards}, workers {self.workers}, max faults {self.max_faults}; expected 0 or more "
                "shards, 1 or more workers, and a share of 0 to 1"
            )


def recode(document: RawDocument, recoding: Recoding) -> Iterator[Record | Reject]:
    """A document with its images as they are stored, and what had to be left out."""
    parts: list[Text | StoredImage] = []
    lost: list[Reject] = []
    images = 0
    for part in document.parts:
        if isinstance(part, Text):
            parts.append(part)
            continue
        where = f"{document.key}#{images}"
        images += 1
        try:
            parts.append(StoredImage(recoding.recode(part.data, where), part.score))
        except ImageError as error:
            lost.append(Reject(where, error.reason, str(error), whole=False))
    kept = sum(isinstance(part, StoredImage) for part in parts)
    # A pair, a video or a chat means nothing without its images; a web document is read on without one.
    if lost and (document.kind not in ("web", "storyboard") or not kept):
        yield Reject(document.key, lost[0].reason, lost[0].detail)
        return
    yield from lost
    yield Record(document.key, document.kind, tuple(parts))


def occurrences(record: Record) -> Iterator[tuple[bytes, tuple[str, int]]]:
    """(digest, (key, n)) of what must not be in the data twice: a web document's images, else all images together.

    Chats may share an image: each asks something else about it.
    """
    images = [part.data for part in record.parts if isinstance(part, StoredImage)]
    if record.kind in CHATS or not images:
        return
    digests = [hashlib.sha256(image).digest() for image in images]
    if record.kind != "web":
        digests = [hashlib.sha256(b"".join(digests)).digest()]
    for number, digest in enumerate(digests):
        yield digest, (record.key, number)


def later_ones(group: tuple[bytes, Iterable[tuple[str, int]]]) -> Iterator[tuple[str, tuple[int, str]]]:
    """All occurrences but the first, in order of keys: (key, (n, where the first is))."""
    (first, number), *others = sorted(group[1])
    for key, n in others:
        yield key, (n, f"{first}#{number}")


def without_duplicates(
    group: tuple[str, Mapping[str, Iterable[Any]]],
) -> Iterator[Record | Reject]:
    """(key, {records, duplicates}) -> the record without what is elsewhere too."""
    key, found = group
    # Two documents of one key cannot both be named: the first by its bytes stays.
    record, *others = sorted(found["records"], key=Record.serialise)
    for _ in others:
        yield Reject(key, "duplicate_key", f"{key}: another document has this key")
    duplicates = dict(found["duplicates"])
    if not duplicates:
        yield record
        return
    if record.kind != "web":
        yield Reject(key, "duplicate", f"{key}: the same images as {duplicates[0]}")
        return
    parts: list[Text | StoredImage] = []
    number = 0
    for part in record.parts:
        if isinstance(part, StoredImage):
            number += 1
            if number - 1 in duplicates:
                where = f"{key}#{number - 1}"
                yield Reject(where, "duplicate", f"{where}: the same as {duplicates[number - 1]}", whole=False)
                continue
        parts.append(part)
    if any(isinstance(part, StoredImage) for part in parts):
        yield dataclasses.replace(record, parts=tuple(parts))
    else:
        yield Reject(key, "no_image", f"{key}: all its images are in other documents too")


def _place(key: str) -> int:
    """A fixed pseudo-random number of a key: its file, and its place there."""
    return int.from_bytes(hashlib.sha256(key.encode("utf-8", "replace")).digest()[:8], "big")


def prepare(reader: Reader, source: str, path: str, out: Path, config: PrepareConfig) -> dict[str, Any]:
    """Prepares everything at `path` into the new folder `out`; returns its manifest.

    Args:
      source: the reader's name, for the manifest and errors.

    Raises:
      UserError: nothing to read, `out` is in use, or more than `config.max_faults` of the documents are faulty.
    """
    try:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
        raise UserError(f"prepare needs Apache Beam ({error}); run `pip install 'emu-jax[prepare]'`") from error
    shards = reader.shards(path)
    _make_folder(out)
    arguments = ["--runner", config.runner, *shlex.split(config.beam)]
    if config.runner == "DirectRunner":
        mode = "multi_processing" if config.workers > 1 else "in_memory"
        arguments += ["--direct_num_workers", str(config.workers), "--direct_running_mode", mode]
        arguments += ["--default_sdk_harness_log_level", "ERROR"]  # it warns of itself
        logging.getLogger("apache_beam").setLevel(logging.ERROR)
    try:
        options = PipelineOptions(arguments)
    except SystemExit as error:  # Beam parses by argparse
        raise UserError(f"Beam refuses its arguments {config.beam!r} for {config.runner}") from error

    try:
        with beam.Pipeline(options=options) as pipeline:
            _build(pipeline, reader, shards, out, config)
    except Exception as error:  # a runner wraps whatever a worker raised, with its traceback as text
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{source}: {config.runner} stopped ({reason[:300]}); nothing is complete, run it again"
        ) from error
    return _finish(out, source, reader, config)


def _build(pipeline: Any, reader: Reader, shards: Sequence[str], out: Path, config: PrepareConfig) -> None:
    """Adds the steps from shards to files to a Beam pipeline."""
    import apache_beam as beam

    read = (
        pipeline
        | "Shards" >> beam.Create(shards, reshuffle=False)
        | "SpreadShards" >> beam.Reshuffle()
        | "Read" >> beam.FlatMap(_Read(reader))
    )
    # The records go on without their images' originals; fusing keeps those out of any shuffle.
    recoded = read | "Recode" >> beam.FlatMap(_Recode(config.recoding))
    records = recoded | "Records" >> beam.Filter(_is_record)
    duplicates = (
        records
        | "Digests" >> beam.FlatMap(occurrences)
        | "SameDigest" >> beam.GroupByKey()
        | "LaterOnes" >> beam.FlatMap(later_ones)
    )
    keyed = records | "ByKey" >> beam.Map(_keyed)
    unique = (
        {"records": keyed, "duplicates": duplicates}
        | "Join" >> beam.CoGroupByKey()
        | "WithoutDuplicates" >> beam.FlatMap(without_duplicates)
    )
    serialised = unique | "Kept" >> beam.Filter(_is_record) | "Serialise" >> beam.Map(_serialised)
    total = serialised | "Sizes" >> beam.Map(_size) | "TotalSize" >> beam.CombineGlobally(sum)
    (
        serialised
        | "AssignShard" >> beam.Map(_assign, config.shards, SHARD_BYTES, beam.pvalue.AsSingleton(total))
        | "GroupShards" >> beam.GroupByKey()
        | "WriteShards" >> beam.Map(_WriteShard(str(out), config.name, config.split))
        | "Entries" >> beam.combiners.ToList()
        | "WriteEntries" >> beam.Map(_write_json, str(out / ENTRIES))
    )
    rejects = (
        (recoded | "Rejects" >> beam.Filter(_is_reject), unique | "MoreRejects" >> beam.Filter(_is_reject))
        | "AllRejects" >> beam.Flatten()
        | "KeyRejects" >> beam.Map(_keyed_reject)
    )
    count = rejects | "CountRejects" >> beam.combiners.Count.Globally()
    (
        rejects
        | "AssignRejects" >> beam.Map(_assign, 0, REJECTS_A_FILE, beam.pvalue.AsSingleton(count))
        | "GroupRejects" >> beam.GroupByKey()
        | "WriteRejects" >> beam.Map(_WriteRejects(str(out)))
        | "Reasons" >> beam.combiners.ToList()
        | "WriteReasons" >> beam.Map(_write_json, str(out / REASONS))
    )


def _make_folder(out: Path) -> None:
    """Makes the folder, or empties what a preparation left that was stopped: it is known by `BEGUN`."""
    if (out / MANIFEST).exists():
        raise UserError(f"--out {out}: it holds prepared data; name a new folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
        found = sorted(out.iterdir())
        if found and not (out / BEGUN).exists():
            raise UserError(f"--out {out}: it holds {found[0].name}; name a new folder")
        (out / BEGUN).touch()
        for stale in found:
            if stale.name != BEGUN:
                stale.unlink()
    except OSError as error:
        raise UserError(
            f"--out {out}: cannot be written ({error.strerror}); name a new folder where you may write"
        ) from error


@dataclasses.dataclass(frozen=True)
class _Read:
    reader: Reader

    def __call__(self, shard: str) -> Iterable[RawDocument | Reject]:
        return self.reader.read(shard)


@dataclasses.dataclass(frozen=True)
class _Recode:
    recoding: Recoding

    def __call__(self, found: RawDocument | Reject) -> Iterable[Record | Reject]:
        return [found] if isinstance(found, Reject) else recode(found, self.recoding)


def _is_record(found: Record | Reject) -> bool:
    return isinstance(found, Record)


def _is_reject(found: Record | Reject) -> bool:
    return isinstance(found, Reject)


def _keyed(record: Record) -> tuple[str, Record]:
    return record.key, record


def _keyed_reject(reject: Reject) -> tuple[str, Reject]:
    return f"{reject.key} {reject.reason}", reject


def _serialised(record: Record) -> tuple[str, bytes]:
    return record.key, record.serialise()


def _size(record: tuple[str, bytes]) -> int:
    return len(record[1])


def _assign(element: tuple[str, Any], fixed: int, most: int, total: int) -> tuple[tuple[int, int], tuple[int, Any]]:
    """((file, files), (place, value)) of (key, value)."""
    files = fixed or max(1, math.ceil(total / most))
    place = _place(element[0])
    return (place % files, files), (place // files, element[1])


@dataclasses.dataclass(frozen=True)
class _WriteShard:
    folder: str
    name: str
    split: str

    def __call__(self, group: tuple[tuple[int, int], Iterable[tuple[int, bytes]]]) -> tuple[str, dict[str, Any]]:
        (index, count), elements = group
        path = Path(self.folder) / shard_name(self.name, self.split, index, count)
        written = write_records(path, (data for _, data in sorted(elements)))
        return path.name, file_entry(path, written)


@dataclasses.dataclass(frozen=True)
class _WriteRejects:
    folder: str

    def __call__(self, group: tuple[tuple[int, int], Iterable[tuple[int, Reject]]]) -> dict[str, list[int]]:
        (index, count), elements = group
        rejects = sorted((reject for _, reject in elements), key=lambda reject: (reject.key, reject.reason))
        name = "rejects.jsonl" if count == 1 else f"rejects-{index:05d}-of-{count:05d}.jsonl"
        path = Path(self.folder) / name
        partial = path.with_suffix(".partial")
        with partial.open("w", encoding="utf-8", errors="replace") as file:
            for reject in rejects:
                file.write(json.dumps(dataclasses.asdict(reject), ensure_ascii=False) + "\n")
        partial.replace(path)
        reasons: dict[str, list[int]] = {}
        for reject in rejects:  # [all, whole documents]
            told = reasons.setdefault(reject.reason, [0, 0])
            told[0] += 1
            told[1] += reject.whole
        return reasons


def _write_json(value: Any, path: str) -> None:
    Path(path).write_text(json.dumps(value), encoding="utf-8")


def _finish(out: Path, source: str, reader: Reader, config: PrepareConfig) -> dict[str, Any]:
    """Weighs the rejects, checks the files, and completes the folder."""
    entries = dict(json.loads((out / ENTRIES).read_text(encoding="utf-8")))
    reasons: dict[str, dict[str, int]] = collections.defaultdict(lambda: {"rejects": 0, "documents": 0})
    for told in json.loads((out / REASONS).read_text(encoding="utf-8")):
        for reason, (count, whole) in told.items():
            reasons[reason]["rejects"] += count
            reasons[reason]["documents"] += whole
    records = sum(entry["records"] for entry in entries.values())
    documents = records + sum(told["documents"] for told in reasons.values())
    faults = sum(
        told["documents" if reason in PARTS_MISSING else "rejects"]
        for reason, told in reasons.items()
        if reason not in RULES
    )
    listed = ", ".join(f"{reason} {counts['rejects']:,}" for reason, counts in sorted(reasons.items())) or "none"
    if faults > config.max_faults * documents:
        raise UserError(
            f"{source}: {faults:,} faults in {documents:,} documents, more than {config.max_faults:.1%}; rejects: "
            f"{listed}; see {out}/rejects.jsonl, mend the data or raise --max-faults"
        )
    if not records:
        raise UserError(f"{source}: no document is left of {documents:,}; rejects: {listed}; see {out}/rejects.jsonl")
    if config.shards and len(entries) != config.shards:
        raise UserError(f"--shards {config.shards}: too many for {records} documents; ask for fewer, or for none")
    settings = {"reader": dataclasses.asdict(reader), "images": dataclasses.asdict(config.recoding)}
    told = {
        "source": source,
        "documents_read": documents,
        "rejects": dict(sorted(reasons.items())),
        "settings": settings,
    }
    manifest = write_manifest(out, config.name, {config.split: entries}, told)
    for name in (ENTRIES, REASONS, BEGUN):
        (out / name).unlink()
    return manifest
