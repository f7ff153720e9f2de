"""MSRVTT-QA: questions about videos, in the format of `formats/video_qa.py`.

`test_qa.json` (and val, train). Videos are `video/video0.mp4`, or in the release's `TrainValVideo/` and `TestVideo/`.
No server takes results.
"""

from __future__ import annotations

from collections.abc import Callable

from emu_jax.evaluate.benchmarks.benchmark import Benchmark
from emu_jax.evaluate.formats.files import Entry, Files
from emu_jax.evaluate.formats.video_qa import reader
from emu_jax.evaluate.metrics.open_answers import figures
from emu_jax.evaluate.prompts import vqa


def _video_names(files: Files) -> Callable[[Entry], tuple[str, ...]]:
    def names(entry: Entry) -> tuple[str, ...]:
        video = f"video{entry.whole('video_id')}.mp4"
        return f"video/{video}", f"TrainValVideo/{video}", f"TestVideo/{video}"

    return names


BENCHMARK = Benchmark(
    name="msrvttqa",
    splits=("test", "val", "train"),
    split="test",
    few_shot_split="train",
    tree=(
        "test_qa.json (and val_qa.json, train_qa.json)",
        "video/video0.mp4 …, or the same in TrainValVideo/ and TestVideo/",
    ),
    described="xudejing/video-question-answering on GitHub, README (questions); MSR-VTT, page of the 2016 challenge "
    "(videos)",
    reader=reader(_video_names),
    prompt=vqa,
    metrics=lambda predictions, questions, _: figures(predictions, questions),
)
