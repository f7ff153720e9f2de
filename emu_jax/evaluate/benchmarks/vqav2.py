"""VQAv2: questions about images, ten people's answers each.

`v2_OpenEnded_mscoco_val2014_questions.json` and `v2_mscoco_val2014_annotations.json`, the same of train2014; of
test2015 and test-dev2015 only questions are published, both on the images of test2015. Kind: answer_type (yes/no,
number, other). The paper's scores are of test-dev, which only the server can give.

Scored by the official rule, and beside it by the rule of the reference's own `VQAEval`, which its code for val uses.
"""

from __future__ import annotations

from collections.abc import Sequence

from emu_jax.evaluate.benchmarks.benchmark import Benchmark, Scoring
from emu_jax.evaluate.formats.vqa import reader, results
from emu_jax.evaluate.intervals import Figure
from emu_jax.evaluate.metrics.vqa import figures, reference_accuracy
from emu_jax.evaluate.prompts import vqa
from emu_jax.evaluate.question import Question


def metrics(predictions: Sequence[str], questions: Sequence[Question], scoring: Scoring) -> dict[str, Figure]:
    """Accuracy by the two rules."""
    references = figures(predictions, questions, reference_accuracy, "accuracy by the reference's rule")
    return figures(predictions, questions) | references


BENCHMARK = Benchmark(
    name="vqav2",
    splits=("val", "test-dev", "test", "train"),
    split="val",
    few_shot_split="train",
    tree=(
        "v2_OpenEnded_mscoco_val2014_questions.json (and train2014, test-dev2015, test2015), here, in Questions/ or in "
        "annotations/",
        "v2_mscoco_val2014_annotations.json (and train2014), here, in Annotations/ or in annotations/",
        "val2014/COCO_val2014_000000262148.jpg … (and train2014/, test2015/), here or in images/",
    ),
    described="visualqa.org, page Download",
    reader=reader("v2_", "answer_type"),
    prompt=vqa,
    metrics=metrics,
    submission=results,
)
