"""OK-VQA: questions about images that need outside knowledge.

`OpenEnded_mscoco_val2014_questions.json` and `mscoco_val2014_annotations.json`, the same of train2014. Kind:
question_type, the category of knowledge (its names are the file's: "one", …; unverified). Answers are "answer", the
stemmed form (the file also has "raw_answer"; that scores are of the former is unverified).

Scored as the reference does, with stems (`okvqa_accuracy`), and beside it by the rule of VQAv2.
"""

from __future__ import annotations

from collections.abc import Sequence

from emu_jax.evaluate.benchmarks.benchmark import Benchmark, Scoring
from emu_jax.evaluate.formats.vqa import reader, results
from emu_jax.evaluate.intervals import Figure
from emu_jax.evaluate.metrics.vqa import figures, okvqa_accuracy
from emu_jax.evaluate.prompts import vqa
from emu_jax.evaluate.question import Question


def metrics(predictions: Sequence[str], questions: Sequence[Question], scoring: Scoring) -> dict[str, Figure]:
    """Accuracy with stems and without them."""
    plain = figures(predictions, questions, name="accuracy without stems")
    return figures(predictions, questions, okvqa_accuracy) | plain


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
    metrics=metrics,
    submission=results,
)
