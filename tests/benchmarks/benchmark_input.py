"""Images a second from files to batches of 224 x 224 uint8, against `webdataset` with Pillow and `tf.data`.

    pip install webdataset tensorflow-cpu          # for this benchmark alone
    python -m tests.benchmarks.benchmark_input [FOLDER] [--video VIDEO]

In: nothing (the embedded images), or a folder of `emu-jax prepare` and a video. Out: a table, a row a loader.

All loaders read the same JPEG bytes and captions, each in its own process on one and the same core, and take turns: one
that has none is stopped, so that nothing is read ahead between them. CPU seconds are those of all threads of a process;
medians of the turns. Two sets of images:

    as stored     as `emu-jax prepare` stores them, at most 224 x 224
    as the web    640 x 480, quality 90: frames of the video, or mosaics of the embedded images

What each does. Ours does more, its competitors' texts stay bytes:

    emu_jax                ArrayRecord, a shuffle of the whole, SentencePiece, packing into rows of 2048 tokens x 44
                           images with their masks and weights; the codec decodes at the smallest k/8 that is enough
    webdataset, Pillow     a tar, a shuffle of 1,000, decode("pilrgb"), bicubic: what most PyTorch code does
    webdataset, draft      the same, but Pillow's codec may decode at 1/2
    tf.data, bicubic       TFRecord, a shuffle of 1,000, decode_jpeg, tf.image.resize bicubic with antialiasing
    tf.data, bilinear      tf.image.resize as it comes: bilinear without antialiasing, which aliases
    tf.data, half          the same after decode_jpeg(ratio=2) where that is enough
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
import io
import itertools
import multiprocessing
import os
import signal
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image as PIL

from emu_jax.data import fluent_emoji
from emu_jax.data.config import DataConfig
from emu_jax.data.counts import figures
from emu_jax.data.document import Text
from emu_jax.data.images import Recoding, decode_image
from emu_jax.data.pipeline import Pipeline, train_tokenizer
from emu_jax.data.prepared import Record, Records, StoredImage, file_entry, shard_name, write_manifest
from emu_jax.data.records import write_records
from emu_jax.data.sources import PairOrder
from emu_jax.errors import UserError

SIZE = 224
ROW_TOKENS, ROW_IMAGES, ROWS = 2048, 44, 4
BATCH = ROWS * ROW_IMAGES
SHUFFLE = 1000
STORED, LARGE = 3000, 800  # images of the two sets, at most: they fit the page cache
ROUNDS, TURN = 7, 1.5  # turns, after one that warms up, and their seconds

Pair = tuple[bytes, str]

# ---------------------------------------------------------------- the images


def embedded_pairs() -> Iterator[Pair]:
    """The embedded images' files and names."""
    yield from _stored_pairs(fluent_emoji.records("train"))


def stored_pairs(folder: Path | None) -> Iterator[Pair]:
    """Images as `emu-jax prepare` stores them: those of a prepared folder, or the embedded ones at 224 x 224."""
    if folder is None:
        recoding = Recoding(SIZE)
        for data, text in embedded_pairs():
            pixels = PIL.fromarray(decode_image(data, text)).resize((SIZE, SIZE), PIL.Resampling.BICUBIC)
            yield recoding.recode(np.asarray(pixels), text), text
        return
    yield from _stored_pairs(Records(folder, "train"))


def _stored_pairs(records: Records) -> Iterator[Pair]:
    for index in range(len(records)):
        parts = records[index].parts
        text = " ".join(part.text for part in parts if isinstance(part, Text))
        yield from ((part.data, text) for part in parts if isinstance(part, StoredImage))


def large_pairs(video: Path | None) -> Iterator[Pair]:
    """640 x 480 JPEG files: every 5th frame of a video, cropped and scaled, or mosaics of 4 x 3 embedded images."""
    for pixels, text in mosaics() if video is None else frames(video):
        yield simplejpeg.encode_jpeg(pixels, 90, colorsubsampling="420"), text


def mosaics() -> Iterator[tuple[np.ndarray, str]]:
    pairs = list(embedded_pairs())
    for first in range(0, len(pairs), 4):
        canvas = PIL.new("RGB", (640, 480), "white")
        for place in range(12):
            data, text = pairs[(first + place) % len(pairs)]
            tile = PIL.fromarray(decode_image(data, text)).resize((160, 160), PIL.Resampling.BICUBIC)
            canvas.paste(tile, (place % 4 * 160, place // 4 * 160))
        yield np.asarray(canvas), pairs[first][1]


def frames(video: Path) -> Iterator[tuple[np.ndarray, str]]:
    import av  # of `emu_jax[prepare]`

    names = [text for _, text in embedded_pairs()]
    with av.open(video) as container:
        for number, frame in enumerate(container.decode(video=0)):
            if number % 5 == 0:
                image = frame.to_image()
                width = min(image.width, image.height * 4 // 3)
                left = (image.width - width) // 2
                box = (left, 0, left + width, image.height)
                resized = image.resize((640, 480), PIL.Resampling.BICUBIC, box)
                yield np.asarray(resized), names[number // 5 % len(names)]


def write_pairs(folder: Path, pairs: Iterator[Pair]) -> tuple[int, int]:
    """Writes them as a prepared folder; returns how many images of how many bytes."""
    folder.mkdir()
    records = [Record(f"{i:06d}", "pair", (StoredImage(data), Text(text))) for i, (data, text) in enumerate(pairs)]
    if not records:
        raise UserError("benchmark_input: no images in the folder or video that was named; name another")
    file = folder / shard_name(folder.name, "train", 0, 1)
    write_records(file, (record.serialise() for record in records))
    settings = {"images": dataclasses.asdict(Recoding(SIZE))}
    write_manifest(folder, folder.name, {"train": {file.name: file_entry(file, len(records))}}, {"settings": settings})
    return len(records), sum(len(record.parts[0].data) for record in records)


def read_pairs(folder: Path) -> Iterator[Record]:
    records = Records(folder, "train")
    return (records[index] for index in range(len(records)))


# ---------------------------------------------------------------- loaders: a folder -> images of each batch

Loader = Callable[[Path], Iterator[int]]


def ours(folder: Path) -> Iterator[int]:
    data = DataConfig(
        source=str(folder),
        split="train",
        seed=0,
        row_tokens=ROW_TOKENS,
        row_images=ROW_IMAGES,
        batch_rows=ROWS,
        packing_window=1024,
        workers=0,
        pairs=PairOrder("random"),
    )
    tokenizer = train_tokenizer(data, SIZE, vocab_size=4000, model_type="bpe")
    for batch in (pipeline := Pipeline(data, tokenizer, queries=32, image_size=SIZE)):
        assert batch["images"].shape == (ROWS, ROW_IMAGES, SIZE, SIZE, 3) and "tensorflow" not in sys.modules
        yield int(figures([pipeline.counts()])["images"])  # empty slots do not count


def webdataset_pillow(folder: Path, *, draft: bool) -> Iterator[int]:
    import webdataset

    file = folder / f"{folder.name}-{os.getpid()}.tar"
    with tarfile.open(file, "w") as tar:
        for record in read_pairs(folder):
            image, text = record.parts
            for name, data in ((f"{record.key}.jpg", image.data), (f"{record.key}.txt", text.text.encode())):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))

    def at_reduced_scale(key: str, data: bytes) -> PIL.Image:
        image = PIL.open(io.BytesIO(data))
        image.draft("RGB", (SIZE, SIZE))
        return image.convert("RGB")

    def resized(image: PIL.Image) -> np.ndarray:
        return np.asarray(image.resize((SIZE, SIZE), PIL.Resampling.BICUBIC))

    def collate(samples: list[tuple[np.ndarray, str]]) -> tuple[np.ndarray, list[str]]:
        images, texts = zip(*samples, strict=True)
        return np.stack(images), list(texts)

    decode = webdataset.handle_extension("jpg", functools.partial(at_reduced_scale, "")) if draft else "pilrgb"
    stream = webdataset.WebDataset(str(file), shardshuffle=False).repeat().shuffle(SHUFFLE).decode(decode)
    stream = stream.to_tuple("jpg", "txt").map_tuple(resized, lambda text: text)
    for images, _ in stream.batched(BATCH, partial=False, collation_fn=collate):
        assert images.shape == (BATCH, SIZE, SIZE, 3) and images.dtype == np.uint8
        yield BATCH


def tf_data(folder: Path, *, bicubic: bool, half: bool) -> Iterator[int]:
    import tensorflow as tf

    file = folder / f"{folder.name}-{os.getpid()}.tfrecord"
    large = 0
    with tf.io.TFRecordWriter(str(file)) as writer:
        for record in read_pairs(folder):
            height, width, *_ = simplejpeg.decode_jpeg_header(record.parts[0].data)
            large += min(height, width) >= 2 * SIZE
            writer.write(record.serialise())
    ratio = 2 if half and large else 1
    features = {name: tf.io.FixedLenFeature([1], tf.string) for name in ("images", "texts")}

    def decode(example: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        fields = tf.io.parse_single_example(example, features)
        pixels = tf.io.decode_jpeg(fields["images"][0], channels=3, ratio=ratio)
        if bicubic:
            pixels = tf.image.resize(pixels, (SIZE, SIZE), "bicubic", antialias=True)
            pixels = tf.clip_by_value(tf.round(pixels), 0.0, 255.0)  # bicubic overshoots; a cast would wrap round
        else:
            pixels = tf.image.resize(pixels, (SIZE, SIZE))
        return tf.cast(pixels, tf.uint8), fields["texts"][0]

    options = tf.data.Options()
    options.threading.private_threadpool_size = 1
    options.threading.max_intra_op_parallelism = 1
    options.deterministic = False
    stream = tf.data.TFRecordDataset(str(file)).repeat().shuffle(SHUFFLE).map(decode, num_parallel_calls=1)
    for images, _ in stream.batch(BATCH, drop_remainder=True).prefetch(1).with_options(options).as_numpy_iterator():
        assert images.shape == (BATCH, SIZE, SIZE, 3) and images.dtype == np.uint8
        yield BATCH


LOADERS: dict[str, Loader] = {
    "emu_jax": ours,
    "webdataset, Pillow": functools.partial(webdataset_pillow, draft=False),
    "webdataset, draft": functools.partial(webdataset_pillow, draft=True),
    "tf.data, bicubic": functools.partial(tf_data, bicubic=True, half=False),
    "tf.data, bilinear": functools.partial(tf_data, bicubic=False, half=False),
    "tf.data, half": functools.partial(tf_data, bicubic=False, half=True),
}

# ---------------------------------------------------------------- taking turns


def contestant(connection: Connection, core: int, name: str, folder: Path) -> None:
    """A process of one loader: answers each number of seconds with (images, CPU seconds, wall seconds)."""
    os.sched_setaffinity(0, {core})  # before TensorFlow counts the cores
    os.environ |= {"TF_CPP_MIN_LOG_LEVEL": "2", "TF_ENABLE_ONEDNN_OPTS": "0"}  # both to be quiet
    batches = LOADERS[name](folder)
    next(batches)
    connection.send(None)
    while (seconds := connection.recv()) is not None:
        started, cpu, images = time.perf_counter(), time.process_time(), 0
        while time.perf_counter() - started < seconds:
            images += next(batches)
        connection.send((images, time.process_time() - cpu, time.perf_counter() - started))


def measure(folder: Path) -> dict[str, tuple[float, float]]:
    """Median images a CPU second and a wall second of each loader."""
    core = max(os.sched_getaffinity(0))
    context = multiprocessing.get_context("spawn")
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in LOADERS}
    processes = {}
    try:
        for name in LOADERS:
            connection, other = context.Pipe()
            process = context.Process(target=contestant, args=(other, core, name, folder), daemon=True)
            process.start()
            other.close()
            processes[name] = process, connection
            _answer(connection, name)
            os.kill(process.pid, signal.SIGSTOP)
        for number in range(ROUNDS + 1):
            for name, (process, connection) in processes.items():
                os.kill(process.pid, signal.SIGCONT)
                connection.send(TURN)
                images, cpu, wall = _answer(connection, name)
                os.kill(process.pid, signal.SIGSTOP)
                if number:
                    rates[name].append((images / cpu, images / wall))
    finally:
        for process, _ in processes.values():
            process.kill()  # a stopped one heeds nothing less
            process.join()
    return {name: tuple(map(statistics.median, zip(*turns, strict=True))) for name, turns in rates.items()}


def _answer(connection: Connection, name: str) -> tuple[int, float, float]:
    try:
        return connection.recv()
    except EOFError:
        raise UserError(f"benchmark_input: the process of {name!r} ended; its error stands above") from None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, nargs="?", help="of `emu-jax prepare` (default: the embedded images)")
    parser.add_argument("--video", type=Path, help="whose frames are the large images (default: mosaics)")
    options = parser.parse_args()
    missing = [name for name in ("webdataset", "tensorflow") if importlib.util.find_spec(name) is None]
    if missing:
        raise SystemExit(f"benchmark_input: no {' and no '.join(missing)}; pip install webdataset tensorflow-cpu")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # stopped processes are ended too
    print(f"batches of {BATCH} images of {SIZE} x {SIZE}, one core, medians of {ROUNDS} turns of {TURN} s")
    with tempfile.TemporaryDirectory() as scratch:
        sets = {"as stored": (stored_pairs(options.folder), STORED), "as the web": (large_pairs(options.video), LARGE)}
        for title, (pairs, most) in sets.items():
            folder = Path(scratch) / title.replace(" ", "_")
            count, size = write_pairs(folder, itertools.islice(pairs, most))
            rates = measure(folder)
            best = max(rate[0] for name, rate in rates.items() if name != "emu_jax")
            print(f"\n{f'{title}: {count:,} of {size / count / 1e3:.1f} kB':32s}  a CPU second  a second  ours, times")
            for name, (cpu, wall) in rates.items():
                times = rates["emu_jax"][0] / (best if name == "emu_jax" else cpu)
                note = " the fastest other" if name == "emu_jax" else ""
                print(f"  {name:30s}{cpu:14,.0f}{wall:10,.0f}{times:13.2f}{note}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(str(error)) from None
