"""COCO captions: images to describe. All reference captions of an image are its question's `answers`.

Karpathy's splits: `dataset_coco.json`, with "cocoid", "filepath": "val2014" and "filename" of an image; test has the
5000 images that the field reports. COCO's own: `captions_val2014.json` and `captions_train2014.json` (splits val2014
and train2014).
"""

from __future__ import annotations

from emu_jax.evaluate.benchmarks.benchmark import Benchmark
from emu_jax.evaluate.formats.captions import KARPATHY, captioned, coco_names, karpathy, results, sentences, texts
from emu_jax.evaluate.formats.files import Files, unique
from emu_jax.evaluate.metrics import captions
from emu_jax.evaluate.prompts import caption
from emu_jax.evaluate.question import Question


def _read(files: Files, split: str) -> list[Question]:
    if split in KARPATHY:
        document = files.document("dataset_coco.json", "annotations/dataset_coco.json")
        known = unique(karpathy(document, split), lambda entry: entry.whole("cocoid"), "cocoid")
        return [
            Question(
                id=str(key),
                images=(files.shown(*coco_names(entry.text("filepath"), entry.text("filename"))),),
                answers=sentences(entry),
            )
            for key, entry in known.items()
        ]
    document = files.document(f"captions_{split}.json", f"annotations/captions_{split}.json")
    return [
        Question(
            id=str(image.whole("id")),
            images=(files.shown(*coco_names(split, image.text("file_name"))),),
            answers=texts(references),
        )
        for image, references in captioned(document)
    ]


BENCHMARK = Benchmark(
    name="coco",
    splits=("test", "val", "train", "val2014", "train2014"),
    split="test",
    few_shot_split="train",
    tree=(
        "dataset_coco.json (splits test, val and train) or captions_val2014.json and captions_train2014.json (splits "
        "val2014 and train2014), here or in annotations/",
        "val2014/COCO_val2014_000000000042.jpg …",
        "train2014/COCO_train2014_000000000009.jpg … (splits train and train2014)",
        "both folders here or in images/",
    ),
    described="cocodataset.org, page Download (2014 images and annotations); Andrej Karpathy's page of Deep "
    "Visual-Semantic Alignments, caption_datasets.zip",
    reader=_read,
    prompt=caption,
    metrics=lambda predictions, questions, scoring: captions.figures(predictions, questions, scoring.missing),
    submission=results,
)
