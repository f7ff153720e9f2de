"""The pairs of `configs/ablations`: the embedded images of one person with one skin tone -> a prepared folder.

    python launch/ablation_data.py runs/ablations/data/people

They are 1,260 of the 3,192 training images, 280 roles in up to five tones, with names such as "woman astronaut: dark
skin tone". What is asked of a model afterwards, roles and tones that it has not seen together, is asked of these alone,
and a small model learns them in a minute. A folder that is complete stays as it is.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from emu_jax.data.embedded_chats import has_one_tone
from emu_jax.data.fluent_emoji import SIZE, read_example, records
from emu_jax.data.prepared import MANIFEST, Record, file_entry, shard_name, write_manifest
from emu_jax.data.records import write_records
from emu_jax.errors import UserError

SPLIT = "train"
SHARDS = 2  # as many as processes that read, at most


def people() -> Iterator[Record]:
    """The records of the images that show one person with one tone."""
    source = records(SPLIT)
    for index in range(len(source)):
        if has_one_tone(read_example(source[index], SIZE)):
            yield source[index]


def write(folder: Path) -> int:
    """Writes the prepared folder, its manifest last; returns the number of records."""
    folder.mkdir(parents=True, exist_ok=True)
    found = list(people())
    name, told = folder.name, records(SPLIT).manifest
    files = {}
    for number in range(SHARDS):
        path = folder / shard_name(name, SPLIT, number, SHARDS)
        written = write_records(path, (record.serialise() for record in found[number::SHARDS]))
        files[path.name] = file_entry(path, written)
    write_manifest(folder, name, {SPLIT: files}, {key: told[key] for key in ("packages", "settings")})
    return len(found)


def main() -> int:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    try:
        if (folder / MANIFEST).is_file():
            print(f"{folder}: is there")
        else:
            print(f"{folder}: {write(folder)} pairs")
    except UserError as error:
        print(f"ablation_data.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
