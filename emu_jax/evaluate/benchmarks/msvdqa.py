"""MSVD-QA: questions about videos, in the format of `formats/video_qa.py`.

`test_qa.json` (and val, train). Videos are `YouTubeClips/-4wsuPCjDBc_5_15.avi`, and the lines of `youtube_mapping.txt`,
"-4wsuPCjDBc_5_15 vid1", give each one's number; or they are `video/vid1.avi` already, as the authors' code expects. No
server takes results.
"""

from __future__ import annotations

from collections.abc import Callable

from emu_jax.errors import UserError
from emu_jax.evaluate.benchmarks.benchmark import Benchmark
from emu_jax.evaluate.formats.files import Entry, Files
from emu_jax.evaluate.formats.video_qa import reader
from emu_jax.evaluate.metrics.open_answers import figures
from emu_jax.evaluate.prompts import vqa
from emu_jax.storage import Path


def _video_names(files: Files) -> Callable[[Entry], tuple[str, ...]]:
    if (files.root / "video").is_dir():
        return lambda entry: (f"video/vid{entry.whole('video_id')}.avi",)
    mapping = files.find("youtube_mapping.txt")
    clips = _read_mapping(mapping)

    def names(entry: Entry) -> tuple[str, ...]:
        if (clip := clips.get(f"vid{entry.whole('video_id')}")) is None:
            raise entry.wrong("video_id", f"the number of a video in {mapping}")
        return (f"YouTubeClips/{clip}.avi",)

    return names


def _read_mapping(path: Path) -> dict[str, str]:
    """`youtube_mapping.txt` -> the clips' names by number: {"vid1": "-4wsuPCjDBc_5_15"}."""
    clips: dict[str, str] = {}
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); expected lines such as -4wsuPCjDBc_5_15 vid1") from error
    for number, line in enumerate(lines, 1):
        match line.split():
            case []:
                continue
            case [clip, name] if name not in clips:
                clips[name] = clip
            case [_, name]:
                raise UserError(f"{path}: line {number} has {name!a} again; expected each number once")
            case _:
                raise UserError(f"{path}: line {number} is {line[:60]!a}; expected a clip and its number: …_5_15 vid1")
    return clips


BENCHMARK = Benchmark(
    name="msvdqa",
    splits=("test", "val", "train"),
    split="test",
    few_shot_split="train",
    tree=(
        "test_qa.json (and val_qa.json, train_qa.json)",
        "youtube_mapping.txt and YouTubeClips/-4wsuPCjDBc_5_15.avi …, or video/vid1.avi …",
    ),
    described="xudejing/video-question-answering on GitHub, README (questions); Microsoft Research Video Description "
    "Corpus, page of the University of Texas (videos)",
    reader=reader(_video_names),
    prompt=vqa,
    metrics=lambda predictions, questions, _: figures(predictions, questions),
)
