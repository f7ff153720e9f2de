"""Flickr30k: images to describe, in Karpathy's splits.

`dataset_flickr30k.json`, with the "filename" of an image. The release's own `results_20130124.token` has no splits and
is not read.
"""

from __future__ import annotations

from pathlib import Path

from emu_jax.evaluate.benchmarks.benchmark import Benchmark
from emu_jax.evaluate.formats.captions import karpathy, sentences
from emu_jax.evaluate.formats.files import Files, unique
from emu_jax.evaluate.metrics import captions
from emu_jax.evaluate.prompts import caption
from emu_jax.evaluate.question import Question


def _read(files: Files, split: str) -> list[Question]:
    document = files.document("dataset_flickr30k.json", "annotations/dataset_flickr30k.json")
    known = unique(karpathy(document, split), lambda entry: entry.text("filename"), "filename")
    return [
        Question(
            id=Path(name).stem,
            images=(files.shown(f"flickr30k-images/{name}", f"flickr30k_images/{name}", f"images/{name}"),),
            answers=sentences(entry),
        )
        for name, entry in known.items()
    ]


BENCHMARK = Benchmark(
    name="flickr30k",
    splits=("test", "val", "train"),
    split="test",
    few_shot_split="train",
    tree=(
        "dataset_flickr30k.json, here or in annotations/",
        "flickr30k-images/1007129816.jpg …, or the same in flickr30k_images/ or images/",
    ),
    described="Flickr30k's page of the University of Illinois (images); Andrej Karpathy's page of Deep "
    "Visual-Semantic Alignments, caption_datasets.zip",
    reader=_read,
    prompt=caption,
    metrics=lambda predictions, questions, scoring: captions.figures(predictions, questions, scoring.missing),
)
