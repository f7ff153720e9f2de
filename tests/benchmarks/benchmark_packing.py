"""Packing against greedy policies: `python -m tests.benchmarks.benchmark_packing [FOLDER[=WEIGHT] …]`.

In: folders of `emu-jax prepare`, mixed by their weights (1 where none is given); without any, documents of the
sizes and shares that pretraining mixes (128 : 128 : 64 : 16 : 16, fixed seed):

    pairs         36 to 80 tokens, of which 34 are the image's (twice, as LAION-2B and LAION-COCO)
    web           200 to 1,500 tokens, 1 to 8 images
    videos        8 images and 20 tokens
    storyboards   4 to 16 images, each with a sentence of 10 to 25 tokens

Out: for windows of 64, 256 and 1024 records the share of padding, of empty image slots, and the cost. Rows hold 2,048
tokens and as many images as come with so many tokens, rounded. The policies:

    next fit      first come, first packed: what does not fit closes the row
    first fit     the first row of the window with room for the tokens and the images
    best fit      of those, the row with the least room for tokens
    pack_window   ours
    (bound)       as many rows as the window's tokens or its images need, whichever are more; no policy needs fewer
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from emu_jax.data.config import DataConfig
from emu_jax.data.document import Image
from emu_jax.data.mixture import SourceConfig, mix, pattern
from emu_jax.data.packing import pack_window
from emu_jax.data.pipeline import train_tokenizer
from emu_jax.data.sequence import TokenizedDocument, tokenize_document
from emu_jax.data.sources import PairOrder
from emu_jax.errors import UserError

ROW_TOKENS, QUERIES = 2048, 32
RECORDS, WINDOWS = 8192, (64, 256, 1024)
ROOMY = 10_000  # images of a row that holds any document's

Documents = list[TokenizedDocument]
Policy = Callable[[Documents, int, int], list[Documents]]

# ---------------------------------------------------------------- documents


def synthetic_records(_: int) -> Iterator[Documents]:
    """Records of the pretraining mixture, one document each."""
    rng = np.random.default_rng(0)
    image = QUERIES + 2
    kinds = itertools.cycle(pattern([128, 128, 64, 16, 16]))
    for number, kind in enumerate(itertools.islice(kinds, RECORDS)):
        if kind < 2:
            count, tokens = 1, rng.integers(36, 81)
        elif kind == 2:
            count = rng.integers(1, 9)
            tokens = max(rng.integers(200, 1501), image * count + 20)
        elif kind == 3:
            count, tokens = 8, 8 * image + 20
        else:
            count = rng.integers(4, 17)
            tokens = 2 + sum(image + rng.integers(10, 26) for _ in range(count))
        nothing = np.zeros(tokens, np.int32)
        images = tuple(Image(nothing, f"{number}#{place}") for place in range(count))
        yield [TokenizedDocument(nothing, nothing, nothing, nothing, images, source=kind)]


def prepared_records(folders: Sequence[str]) -> Callable[[int], Iterator[Documents]]:
    """Records of prepared folders, mixed as training mixes them."""
    mixture = {}
    for folder in folders:
        path, _, weight = folder.partition("=")
        mixture[folder] = SourceConfig(path, weight=float(weight or 1), subsequences=True)
    data = DataConfig("", "train", 0, ROW_TOKENS, 1, 1, 1, 0, PairOrder("random"), mixture=mixture)
    tokenizer = train_tokenizer(data, 8, vocab_size=4000, model_type="bpe")
    sources = data.open(8)
    stream = mix({name: len(source) for name, source in sources.items()}, mixture, data.seed)
    opened = list(sources.values())

    def records(row_images: int) -> Iterator[Documents]:
        rng = np.random.default_rng(0)
        sizes = {"queries": QUERIES, "row_tokens": ROW_TOKENS, "row_images": row_images}
        for source, index in itertools.islice(iter(stream), RECORDS):
            documents = opened[source].documents(*opened[source].read([index]), rng)
            yield [piece for document in documents for piece in tokenize_document(document, tokenizer, **sizes)]

    return records


# ---------------------------------------------------------------- policies


def next_fit(documents: Documents, row_tokens: int, row_images: int) -> list[Documents]:
    rows: list[Documents] = []
    tokens = images = math.inf
    for document in documents:
        if tokens + len(document) > row_tokens or images + len(document.images) > row_images:
            rows.append([])
            tokens = images = 0
        rows[-1].append(document)
        tokens += len(document)
        images += len(document.images)
    return rows


def any_fit(documents: Documents, row_tokens: int, row_images: int, *, best: bool) -> list[Documents]:
    rows: list[Documents] = []
    room = np.zeros((len(documents), 2), np.int64)
    for document in documents:
        size = np.array([len(document), len(document.images)])
        fits = np.flatnonzero((room[: len(rows)] >= size).all(1))
        if len(fits):
            chosen = fits[np.argmin(room[fits, 0])] if best else fits[0]
        else:
            chosen = len(rows)
            rows.append([])
            room[chosen] = row_tokens, row_images
        rows[chosen].append(document)
        room[chosen] -= size
    return rows


def first_fit(documents: Documents, row_tokens: int, row_images: int) -> list[Documents]:
    return any_fit(documents, row_tokens, row_images, best=False)


def best_fit(documents: Documents, row_tokens: int, row_images: int) -> list[Documents]:
    return any_fit(documents, row_tokens, row_images, best=True)


POLICIES: dict[str, Policy] = {
    "next fit": next_fit,
    "first fit": first_fit,
    "best fit": best_fit,
    "pack_window": pack_window,
}

# ---------------------------------------------------------------- the table


def size(documents: Documents) -> np.ndarray:
    """Their tokens and images, of which those that share a key count once: [2]."""
    return np.array([sum(map(len, documents)), len({image.key for document in documents for image in document.images})])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folders", nargs="*", metavar="FOLDER[=WEIGHT]", help="of `emu-jax prepare`")
    folders = parser.parse_args().folders
    records_of = prepared_records(folders) if folders else synthetic_records
    sample = list(records_of(ROOMY))
    tokens, images = sum(map(size, sample))
    if not images:
        raise UserError("benchmark_packing: the folders' documents hold no image; name others")
    row_images = max(1, round(ROW_TOKENS * images / tokens))
    records = list(records_of(row_images))
    print(
        f"{len(records):,} records, {tokens / len(sample):.0f} tokens and {images / len(sample):.2f} images a "
        f"record, {tokens / images:.1f} tokens an image: row_tokens={ROW_TOKENS} go with "
        f"row_images={ROW_TOKENS * images / tokens:.2f}"
    )
    exact = ROW_TOKENS * images / tokens
    padding, empty = max(0.0, 1 - row_images / exact), max(0.0, 1 - exact / row_images)
    print(
        f"with row_images={row_images}, whatever the policy, {padding:.2%} of the positions must be padding and "
        f"{empty:.2%} of the image slots empty\n"
    )
    print(f"{'window':>6s}  {'policy':14s}{'padding':>9s}{'empty slots':>13s}{'rows':>7s}{'µs a document':>15s}")
    for window in WINDOWS:
        starts = range(0, len(records) - window + 1, window)
        windows = [records[start : start + window] for start in starts]
        capacity = np.array([ROW_TOKENS, row_images])
        bound = sum(math.ceil((sum(map(size, records)) / capacity).max() - 1e-9) for records in windows)
        flat = [[piece for record in records for piece in record] for records in windows]
        for name, policy in POLICIES.items():
            started = time.process_time()
            rows = [row for documents in flat for row in policy(documents, ROW_TOKENS, row_images)]
            cost = (time.process_time() - started) / sum(map(len, flat))
            assert sum(map(len, rows)) == sum(map(len, flat))
            wasted = 1 - sum(map(size, rows)) / (capacity * len(rows))
            print(f"{window:6d}  {name:14s}{wasted[0]:9.2%}{wasted[1]:13.2%}{len(rows):7d}{1e6 * cost:15.1f}")
        wasted = 1 - sum(size(record) for records in windows for record in records) / (capacity * bound)
        print(f"{window:6d}  {'(bound)':14s}{wasted[0]:9.2%}{wasted[1]:13.2%}{bound:7d}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(str(error)) from None
