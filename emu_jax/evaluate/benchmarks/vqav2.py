"""VQAv2: questions about images, ten people's answers each.

`v2_OpenEnded_mscoco_val2014_questions.json` and `v2_mscoco_val2014_annotations.json`, the same of train2014; of
test2015 and test-dev2015 only questions are published, both on the images of test2015. Kind: answer_type (yes/no,
number, other). The paper's scores are of test-dev, which only the server can give.
"""

from __future__ import annotations

from emu_jax.evaluate.benchmarks.benchmark import Benchmark
from emu_jax.evaluate.formats.vqa import reader, results
from emu_jax.evaluate.metrics.vqa import figures
from emu_jax.evaluate.prompts import vqa

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
    metrics=lambda predictions, questions, _: figures(predictions, questions),
    submission=results,
)
