"""OK-VQA: questions about images that need outside knowledge.

`OpenEnded_mscoco_val2014_questions.json` and `mscoco_val2014_annotations.json`, the same of train2014. Kind:
question_type, the category of knowledge (its names are the file's: "one", …; unverified). Answers are "answer", the
stemmed form (the file also has "raw_answer"; that scores are of the former is unverified).
"""

from __future__ import annotations

from emu_jax.evaluate.benchmarks.benchmark import Benchmark
from emu_jax.evaluate.formats.vqa import reader, results
from emu_jax.evaluate.metrics.vqa import figures
from emu_jax.evaluate.prompts import vqa

BENCHMARK = Benchmark(
    name="okvqa",
    splits=("val", "train"),
    split="val",
    few_shot_split="train",
    tree=(
        "OpenEnded_mscoco_val2014_questions.json (and train2014), here, in Questions/ or in annotations/",
        "mscoco_val2014_annotations.json (and train2014), here, in Annotations/ or in annotations/",
        "val2014/COCO_val2014_000000297147.jpg … (and train2014/), here or in images/",
    ),
    described="okvqa.allenai.org, page Download; cocodataset.org, page Download (2014 images)",
    reader=reader("", "question_type"),
    prompt=vqa,
    metrics=lambda predictions, questions, _: figures(predictions, questions),
    submission=results,
)
