"""Shares of samples, tokens and images by source, beside the weights: `python -m tests.benchmarks.benchmark_mixture`.

In: documents of the sizes that pretraining mixes (128 : 128 : 64 : 16 : 16, as in `benchmark_packing`), Q = 32, rows of
2,048 tokens; storyboards of 4 to 16 frames, and of 80 to 120:

    laion_2b, laion_coco    36 to 80 tokens, of which 34 are the image's
    mmc4                    200 to 1,500 tokens, 1 to 8 images: two sub-sequences a record
    webvid                  8 frames and 20 tokens
    storyboard              frames with a sentence of 10 to 25 tokens each

Out: the shares under each unit of weights. "records, whole" is a rule without windows: a record is drawn by its weight,
and a long storyboard gives all its pieces, in rows of 8 images; the others choose the images of a row.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np

from emu_jax.data.config import DataConfig
from emu_jax.data.document import Document, Image, Text
from emu_jax.data.mixture import SourceConfig
from emu_jax.data.row_sizes import RowFill, size_rows
from emu_jax.data.samples import Samples
from emu_jax.data.sources import PairOrder, subsequences
from emu_jax.data.tokenizer import Tokenizer
from emu_jax.data.windows import make_windows

QUERIES, ROW_TOKENS, SIZE = 32, 2048, 1
IMAGE_TOKENS = QUERIES + 2
WEIGHTS = {"laion_2b": 128.0, "laion_coco": 128.0, "mmc4": 64.0, "webvid": 16.0, "storyboard": 16.0}
RECORDS, WINDOW = 200_000, 1024
SHIPPED = 8  # images of a row without windows
PIXELS = np.zeros((SIZE, SIZE, 3), np.uint8)
TOKENIZER = Tokenizer.train(["a b"], vocab_size=20, model_type="word")


def words(count: int) -> Text:
    return Text(" ".join(["a"] * count))


class Simulated:
    """A source whose records have the sizes of a published set's; a record is the same at every visit."""

    fingerprint = "simulated"
    images_fingerprint = ""
    remark = ""

    def __init__(self, name: str, frames: tuple[int, int], windows: bool):
        self._name, self._frames, self._windows = name, frames, windows

    def __len__(self) -> int:
        return RECORDS

    def read(self, indices: Sequence[int]) -> list[int]:
        return list(indices)

    def texts(self) -> list[str]:
        return []

    def documents(self, record: int, rng: np.random.Generator) -> list[Document]:
        size = np.random.default_rng([sorted(WEIGHTS).index(self._name), record])
        images = [Image(PIXELS, f"{self._name}/{record}#{number}") for number in range(150)]
        if self._name.startswith("laion"):
            return PairOrder("random").documents(images[:1], words(size.integers(36, 81) - IMAGE_TOKENS - 1).text, rng)
        if self._name == "webvid":
            return PairOrder("random").documents(images[:8], words(18).text, rng)
        if self._name == "mmc4":
            count = size.integers(1, 9)
            said = max(size.integers(200, 1501) - IMAGE_TOKENS * count, 20) // count
            return subsequences([part for n in range(count) for part in (images[n], words(said))], rng)
        frames = range(size.integers(self._frames[0], self._frames[1] + 1))
        parts = [part for n in frames for part in (words(size.integers(10, 26)), images[n])]
        return [Document(tuple(parts), window=self._windows)]


def shares(unit: str, frames: tuple[int, int], windows: bool, count: int) -> tuple[DataConfig, RowFill, dict, int]:
    """Samples, tokens and images of each source [3] in so many windows; and how many samples a cut ends."""
    entries = {name: SourceConfig(name, weight=weight) for name, weight in WEIGHTS.items()}
    order = PairOrder("random")
    row_images = 0 if windows else SHIPPED
    data = DataConfig("", "train", 0, ROW_TOKENS, row_images, 1, WINDOW, 0, order, mixture=entries, mixture_unit=unit)
    samples = Samples({name: Simulated(name, frames, windows) for name in WEIGHTS}, TOKENIZER, data, QUERIES)
    data, fill = size_rows(data, samples, QUERIES)
    stream = make_windows(samples.with_rows(data), data)
    found = {name: np.zeros(3) for name in WEIGHTS}
    cut = 0
    for number in range(count):
        for row in stream[number]:
            for sample in row:
                found[list(WEIGHTS)[sample.source]] += (1, len(sample), len(sample.images))
                cut += sample.cut
    return data, fill, found, cut


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--windows", type=int, default=24, help=f"of {WINDOW} records")
    count = parser.parse_args().windows
    total = sum(WEIGHTS.values())
    for frames in ((4, 16), (80, 120)):
        for unit, windows in (("records", False), ("samples", True), ("records", True), ("tokens", True)):
            data, fill, found, cut = shares(unit, frames, windows, count)
            sums = sum(found.values())
            title = f"{unit}{'' if windows else ', whole'}"
            print(
                f"\nstoryboards of {frames[0]} to {frames[1]} frames, weights count {title}: {sums[0]:,.0f} samples of "
                f"{count * WINDOW:,} records, {cut:,} cut; row_images={data.row_images}, {fill.padding:.1%} "
                f"padding, {fill.empty_slots:.1%} empty slots"
            )
            print(f"{'':12s}{'weight':>9s}{'samples':>9s}{'tokens':>9s}{'images':>9s}")
            for name, counts in found.items():
                cells = "".join(f"{share:9.2%}" for share in counts / sums)
                print(f"{name:12s}{WEIGHTS[name] / total:9.2%}{cells}")


if __name__ == "__main__":
    main()
