"""Records a second in random order, one at a time and together: `python -m tests.benchmarks.benchmark_reading`.

In: nothing; 64 files of 64 records of 10 kB. Out: a table, a row for each place and way of reading 1,024 of them:

    disk       a local disk whose pages are in memory
    bucket     a bucket server on loopback that answers each request `--delay` (0.03) seconds late
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from emu_jax.data.record_files import RecordFile, RecordFiles
from emu_jax.data.records import write_records
from emu_jax.storage import Path as AnyPath
from emu_jax.storage import as_path
from tests.buckets import FaultyProxy, environment, free_port, gcs_environment, gcs_server

FILES, RECORDS, SIZE, READ = 64, 64, 10_000, 1024


def write(folder: Path, copy: AnyPath) -> Iterator[tuple[RecordFile, RecordFile]]:
    """The files in both places."""
    for number in range(FILES):
        chance = random.Random(number)
        path = folder / f"{number}.array_record"
        write_records(path, (chance.randbytes(SIZE) for _ in range(RECORDS)))
        data = path.read_bytes()
        (copy / path.name).write_bytes(data)
        yield RecordFile(path, RECORDS, len(data)), RecordFile(copy / path.name, RECORDS, len(data))


def rate(records: RecordFiles, indices: list[int], together: int) -> float:
    began = time.monotonic()
    for first in range(0, len(indices), together):
        records.read(indices[first : first + together])
    return len(indices) / (time.monotonic() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--delay", type=float, default=0.03, help="seconds")
    delay, port = parser.parse_args().delay, free_port()
    with tempfile.TemporaryDirectory() as folder:
        root, local = Path(folder, "server"), Path(folder, "local")
        (root / "bucket").mkdir(parents=True)
        local.mkdir()
        with (
            FaultyProxy(port, 1.0, faults=("delay",), delay=delay) as proxy,
            gcs_server(root, proxy.url, port),
            environment(gcs_environment(proxy.url)),
        ):
            here, there = zip(*write(local, as_path("gs://bucket/records")), strict=True)
            order = random.Random(0).sample(range(FILES * RECORDS), 2 * READ)
            print(f"{'':8s}{'one at a time':>16s}{'together':>12s}   records/s")
            for name, files in (("disk", here), ("bucket", there)):
                records = RecordFiles(files)
                records.read(range(0, len(records), RECORDS))  # opens the files
                one = rate(records, order[: READ if name == "disk" else READ // 16], 1)
                print(f"{name:8s}{one:16,.0f}{rate(records, order[READ:], READ):12,.0f}")


if __name__ == "__main__":
    main()
