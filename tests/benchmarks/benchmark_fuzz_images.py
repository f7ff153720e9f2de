"""Damaged images through the one opener: `python -m tests.benchmarks.benchmark_fuzz_images --images 20000`.

In: 32 variants of JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF and PPM (`tests/data/damaged_images.py`), with bytes flipped,
cut and spliced, as many as `--images` says, in turn. Each is decoded as prompts, prepared records, the reference's
reading and animations are. Memory stays the same however many there are; `--limit` bounds what one process may map.

Out: a table: variant, images, those refused with an `ImageError` or a `VideoError`, escapes (any other exception, words
that are not printable or that change from one decoding to the next, images beyond the limit of pixels), and the CPU
time of the slowest reading. Escaped images are written to `--out`. Exit code 1 if any escaped.

    python -m tests.benchmarks.benchmark_fuzz_images --images 1000000 --out /tmp/escaped > fuzz.txt &
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import os
import random
import resource
import sys
from pathlib import Path

import PIL

from tests.data.damaged_images import damaged, variants
from tests.data.decoded_anyhow import Escape, decode_anyhow


@dataclasses.dataclass
class Row:
    images: int = 0
    refused: int = 0
    escapes: int = 0
    slowest: float = 0.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder of the images that escaped")
    parser.add_argument("--limit", type=int, default=6, help="GiB of address space")
    options = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (options.limit << 30, options.limit << 30))
    progress = os.fdopen(os.dup(2), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libtiff writes a line about each fault
    whole = variants()
    others = list(whole.values())
    rows, words = {name: Row() for name in whole}, collections.Counter()
    for number in range(options.images):
        name = list(whole)[number % len(whole)]
        data = damaged(whole[name], random.Random(options.seed << 32 | number), others)
        row = rows[name]
        row.images += 1
        try:
            decoded = decode_anyhow(data)
            row.refused += decoded.refused
            row.slowest = max(row.slowest, decoded.seconds)
        except Escape as escape:
            row.escapes += 1
            words[str(escape)] += 1
            if options.out:
                options.out.mkdir(parents=True, exist_ok=True)
                (options.out / f"{options.seed}-{number}").write_bytes(data)
        if number % 10_000 == 9_999:
            print(
                f"{number + 1} images, {sum(row.escapes for row in rows.values())} escapes", file=progress, flush=True
            )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    print(f"Pillow {PIL.__version__}, seed {options.seed}, peak {peak} MB\n")
    print(f"{'variant':18}{'images':>9}{'refused':>9}{'escapes':>9}{'slowest':>11}")
    for name, row in rows.items():
        print(f"{name:18}{row.images:9}{row.refused:9}{row.escapes:9}{row.slowest * 1000:8.0f} ms")
    total = [sum(getattr(row, field) for row in rows.values()) for field in ("images", "refused", "escapes")]
    print(f"{'all':18}{total[0]:9}{total[1]:9}{total[2]:9}")
    for text, count in words.most_common():
        print(f"{count:9}  {text}")
    return int(total[2] > 0)


if __name__ == "__main__":
    sys.exit(main())
