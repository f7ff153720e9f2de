"""`emu-jax prepare`: raw data of one format -> a prepared folder (`prepared.py`), by Apache Beam.

    shards ─ read ─┬─ images checked and re-encoded ─┬─ deduplicated ─ grouped by hash of the key ─ ArrayRecord files
                   └─ rejects ───────────────────────┴─ rejects ─ rejects.jsonl

The same pipeline runs in one process, in several on one machine, or on Dataflow, Flink or Spark; all workers must see
the folders of input and output, which may be in buckets. The same input and settings give the same bytes for any number
of workers. A TFDS builder does not, because its serialised bytes differ from run to run; TFDS can read the result.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from emu_jax.data.document import Text
from emu_jax.data.images import ImageError, Recoding
from emu_jax.data.kinds import KINDS
from emu_jax.data.prepared import MANIFEST, Record, StoredImage, file_entry, shard_name, write_manifest
from emu_jax.data.raw.limits import by_file, read_first
from emu_jax.data.raw.reader import RawDocument, Reader, Reject
from emu_jax.data.records import write_records
from emu_jax.data.summary import LeftOut, Summary, count_rejects, merge
from emu_jax.errors import TransientError, UserError
from emu_jax.storage import Path, as_path, replace_text, write_atomically

SHARD_BYTES = 256 << 20
REJECTS_PER_FILE = 1_000_000
MAX_NAME_CHARACTERS = 100  # of a data set
BEGUN = "begun.partial"  # exists while a preparation runs
ENTRIES, REASONS = "entries.partial", "reasons.partial"  # results that workers pass to the starting process


@dataclasses.dataclass(frozen=True)
class PrepareConfig:
    """How a data set is prepared.

    Attributes:
      name, split: the data set's name and split in TFDS.
      shards: number of record files; 0 makes files of about 256 MB.
      max_faults: share of the documents that may be faulty.
      runner: Beam's runner.
      workers: processes of the local runner.
      beam: further command-line arguments for Beam.
      limit: number of records of each raw file that are read, from its beginning (`raw/limits.py`); 0 reads all.
    """

    name: str
    split: str = "train"
    shards: int = 0
    max_faults: float = 0.02
    recoding: Recoding = dataclasses.field(default_factory=Recoding)
    runner: str = "DirectRunner"
    workers: int = 1
    beam: str = ""
    limit: int = 0

    def __post_init__(self):
        # TFDS's rule, which it applies only when everything is written.
        if not re.fullmatch(r"[A-Za-z]\w*", self.name) or len(self.name) > MAX_NAME_CHARACTERS:
            raise UserError(
                f"the data set would be called {self.name!r:.80}; its name has to begin with a letter from A to Z and "
                f"to hold letters, digits and underscores only, at most {MAX_NAME_CHARACTERS}: choose one with --name"
            )
        if not self.split.isidentifier():
            raise UserError(f"--split {self.split}: expected letters, digits and underscores, as train")
        if self.shards < 0 or self.workers < 1 or self.limit < 0:
            raise UserError(
                f"shards {self.shards}, workers {self.workers}, limit {self.limit}; expected 0 or more shards, 1 or "
                "more workers, and a limit of 1 or more"
            )
        check_max_faults(self.max_faults)


def check_max_faults(share: float) -> None:
    """Raises unless it is a share."""
    if not 0 <= share <= 1:
        raise UserError(f"max faults {share}; expected a share of 0 to 1")


def recode(document: RawDocument, recoding: Recoding) -> Iterator[Record | Reject]:
    """A document with its images as they are stored, and rejects for what had to be left out."""
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
    if lost and not (kept and KINDS[document.kind].optional_images):
        yield Reject(document.key, lost[0].reason, lost[0].detail)
        return
    yield from lost
    yield Record(document.key, document.kind, tuple(parts))


def occurrences(record: Record) -> Iterator[tuple[bytes, tuple[str, int]]]:
    """(digest, (key, n)) of everything that must not occur twice, by `Kind.unique`; n counts within the document."""
    images = [part.data for part in record.parts if isinstance(part, StoredImage)]
    unique = KINDS[record.kind].unique
    if not unique or not images:
        return
    digests = [hashlib.sha256(image).digest() for image in images]
    if unique == "documents":
        digests = [hashlib.sha256(b"".join(digests)).digest()]
    for number, digest in enumerate(digests):
        yield digest, (record.key, number)


def later_ones(group: tuple[bytes, Iterable[tuple[str, int]]]) -> Iterator[tuple[str, tuple[int, str]]]:
    """All occurrences of a digest but the first, in order of keys: (key, (n, name of the first))."""
    (first, number), *others = sorted(group[1])
    for key, n in others:
        yield key, (n, f"{first}#{number}")


def without_duplicates(
    group: tuple[str, Mapping[str, Iterable[Any]]],
) -> Iterator[Record | Reject]:
    """(key, {records, duplicates}) -> the record without its duplicates, and rejects for them."""
    key, found = group
    # Of documents that share a key, the first by its bytes is kept.
    record, *others = sorted(found["records"], key=Record.serialise)
    for _ in others:
        yield Reject(key, "duplicate_key", f"{key}: another document has this key")
    duplicates = dict(found["duplicates"])
    if not duplicates:
        yield record
        return
    if KINDS[record.kind].unique == "documents":
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
    """A fixed pseudo-random number for a key, which decides its file and its position there."""
    return int.from_bytes(hashlib.sha256(key.encode("utf-8", "replace")).digest()[:8], "big")


def prepare(reader: Reader, source: str, path: str, out: Path, config: PrepareConfig) -> dict[str, Any]:
    """Prepares everything at `path` into the new folder `out`; returns its manifest.

    Args:
      source: the reader's name, for the manifest and errors.

    Raises:
      UserError: there is nothing to read, or `out` is in use.
      Refused: more than `config.max_faults` of the documents are faulty, or none is left.
    """
    try:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
        raise UserError(f"prepare needs Apache Beam ({error}); run `pip install 'emu-jax[prepare]'`") from error
    shards = reader.shards(path)
    make_folder(out)
    arguments = ["--runner", config.runner, *shlex.split(config.beam)]
    if config.runner == "DirectRunner":
        mode = "multi_processing" if config.workers > 1 else "in_memory"
        arguments += ["--direct_num_workers", str(config.workers), "--direct_running_mode", mode]
        arguments += ["--default_sdk_harness_log_level", "ERROR"]  # it warns about itself
        logging.getLogger("apache_beam").setLevel(logging.ERROR)
    try:
        options = PipelineOptions(arguments)
    except SystemExit as error:  # Beam parses by argparse
        raise UserError(f"Beam refuses its arguments {config.beam!r} for {config.runner}") from error

    try:
        with beam.Pipeline(options=options) as pipeline:
            _build(pipeline, reader, shards, out, config)
    except Exception as error:  # a runner wraps a worker's exception, with its traceback as text
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        if TransientError.__name__ in f"{type(error).__name__} {error}":
            raise TransientError(f"{source}: {config.runner} stopped ({reason[:300]}); run it again") from error
        raise UserError(
            f"{source}: {config.runner} stopped ({reason[:300]}); nothing is complete, run it again"
        ) from error
    return _finish(out, source, reader, config)


def _build(pipeline: Any, reader: Reader, shards: Sequence[str], out: Path, config: PrepareConfig) -> None:
    """Adds the steps from shards to files to a Beam pipeline."""
    import apache_beam as beam

    read = (
        pipeline
        | "Shards" >> beam.Create(by_file(shards) if config.limit else [(shard,) for shard in shards], reshuffle=False)
        | "SpreadShards" >> beam.Reshuffle()
        | "Read" >> beam.FlatMap(_Read(reader, config.limit))
    )
    # Records no longer hold the original images; fusing keeps the originals out of every shuffle.
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
        | "AssignRejects" >> beam.Map(_assign, 0, REJECTS_PER_FILE, beam.pvalue.AsSingleton(count))
        | "GroupRejects" >> beam.GroupByKey()
        | "WriteRejects" >> beam.Map(_WriteRejects(str(out)))
        | "Reasons" >> beam.combiners.ToList()
        | "WriteReasons" >> beam.Map(_write_json, str(out / REASONS))
    )


def make_folder(out: Path) -> None:
    """Makes the folder; a folder that a stopped preparation left, recognised by `BEGUN`, is emptied first."""
    if (out / MANIFEST).exists():
        raise UserError(f"{out}: it holds prepared data; name a new folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
        found = sorted(out.iterdir()) if out.is_dir() else []
        if found and not (out / BEGUN).exists():
            raise UserError(f"{out}: it holds {found[0].name}; name a new folder")
        replace_text(out / BEGUN, "")
        for stale in found:
            if stale.name != BEGUN:
                stale.unlink()
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); name a folder that you may write to") from error


@dataclasses.dataclass(frozen=True)
class _Read:
    reader: Reader
    limit: int

    def __call__(self, pieces: Sequence[str]) -> Iterable[RawDocument | Reject]:
        return read_first(self.reader, pieces, self.limit)


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
    """(key, value) -> ((file, files), (position, value)).

    Args:
      fixed: number of files; 0 makes files of at most about `most` units, of which there are `total`.
    """
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
        path = as_path(self.folder) / shard_name(self.name, self.split, index, count)
        with write_atomically(path) as partial:
            entry = file_entry(partial, write_records(partial, (data for _, data in sorted(elements))))
        return path.name, entry


@dataclasses.dataclass(frozen=True)
class _WriteRejects:
    folder: str

    def __call__(self, group: tuple[tuple[int, int], Iterable[tuple[int, Reject]]]) -> dict[str, LeftOut]:
        (index, count), elements = group
        rejects = sorted((reject for _, reject in elements), key=lambda reject: (reject.key, reject.reason))
        name = "rejects.jsonl" if count == 1 else f"rejects-{index:05d}-of-{count:05d}.jsonl"
        with (
            write_atomically(as_path(self.folder) / name) as partial,
            partial.open("w", encoding="utf-8", errors="replace") as file,
        ):
            for reject in rejects:
                file.write(json.dumps(dataclasses.asdict(reject), ensure_ascii=False) + "\n")
        return count_rejects(rejects)


def _write_json(value: Any, path: str) -> None:
    replace_text(as_path(path), json.dumps(value))


def _finish(out: Path, source: str, reader: Reader, config: PrepareConfig) -> dict[str, Any]:
    """Checks the number of faults and files, and completes the folder."""
    entries = dict(json.loads((out / ENTRIES).read_text(encoding="utf-8")))
    files = json.loads((out / REASONS).read_text(encoding="utf-8"))
    found = [{reason: LeftOut(n, whole, tuple(some)) for reason, (n, whole, some) in file.items()} for file in files]
    summary = Summary(sum(entry["records"] for entry in entries.values()), merge(found))
    summary.check(config.max_faults, source, f"see {out}/rejects.jsonl, ")
    if config.shards and len(entries) != config.shards:
        raise UserError(f"shards={config.shards}: too many for {summary.records} documents; choose fewer, or 0")
    settings = {"reader": dataclasses.asdict(reader), "images": dataclasses.asdict(config.recoding)}
    details = {
        "source": source,
        "limit": config.limit or None,
        **summary.as_json(),
        "settings": settings,
    }
    manifest = write_manifest(out, config.name, {config.split: entries}, details)
    for name in (ENTRIES, REASONS, BEGUN):
        (out / name).unlink()
    return manifest
