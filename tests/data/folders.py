"""Prepared folders for tests, written by the package's own writers."""

import functools
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from emu_jax.data.document import Text
from emu_jax.data.images import Recoding
from emu_jax.data.latents import LatentExample, LatentsFolder
from emu_jax.data.prepared import Record, StoredImage, file_entry, shard_name, write_manifest
from emu_jax.data.records import write_records

SIZE = 16
RECODING = Recoding(image_size=SIZE, min_side=1)


@functools.cache
def image(number: int) -> StoredImage:
    """A JPEG of noise."""
    pixels = np.random.default_rng(number).integers(0, 256, (24, 20, 3), np.uint8)
    return StoredImage(RECODING.recode(pixels, f"image {number}"))


def pairs(name: str, count: int) -> list[Record]:
    """Pairs with texts of their own, of one to four words."""
    texts = [f"{name}{number}" + " word" * (number % 4) for number in range(count)]
    return [Record(f"{name}/{n}", "pair", (image(n), Text(text))) for n, text in enumerate(texts)]


def write_folder(folder: Path, records: Sequence[Record], shards: int = 2) -> Path:
    """A folder as `emu-jax prepare` leaves it."""
    folder.mkdir(parents=True)
    files = {}
    for index in range(shards):
        path = folder / shard_name(folder.name, "train", index, shards)
        count = write_records(path, [record.serialise() for record in records[index::shards]])
        files[path.name] = file_entry(path, count)
    settings = {"images": {"image_size": SIZE}}
    write_manifest(folder, folder.name, {"train": files}, {"source": "test", "settings": settings})
    return folder


def write_latents(folder: Path, chunks: Sequence[Iterable[LatentExample]], dtype: str = "float32", **settings) -> int:
    """A folder as `emu-jax precompute` leaves it; the embeddings of the empty prompt are 1."""
    writer = LatentsFolder(folder, len(chunks), dtype, settings)
    shape = ()
    for number in writer.missing():
        examples = list(chunks[number])
        shape = examples[0].condition.shape if examples else shape
        writer.write(number, examples)
    count = writer.finish(np.ones(shape, np.float32))
    assert count is not None
    return count
