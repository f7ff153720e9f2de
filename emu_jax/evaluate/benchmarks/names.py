"""Every benchmark by its name."""

from __future__ import annotations

from emu_jax.errors import UserError, nearest
from emu_jax.evaluate.benchmarks.benchmark import Benchmark
from emu_jax.evaluate.benchmarks.captions import COCO, FLICKR30K, NOCAPS
from emu_jax.evaluate.benchmarks.drawing import COCO_DRAWING
from emu_jax.evaluate.benchmarks.embedded import FLUENT, FLUENT_QA
from emu_jax.evaluate.benchmarks.mmvet import MMVET
from emu_jax.evaluate.benchmarks.video_qa import MSRVTT_QA, MSVD_QA, NEXT_QA
from emu_jax.evaluate.benchmarks.visdial import VISDIAL
from emu_jax.evaluate.benchmarks.vqa import OKVQA, VIZWIZ, VQAV2

_ALL = (COCO, NOCAPS, FLICKR30K, VQAV2, OKVQA, VIZWIZ, VISDIAL, MSVD_QA, MSRVTT_QA, NEXT_QA, MMVET, COCO_DRAWING)
_ALL += (FLUENT, FLUENT_QA)
BENCHMARKS: dict[str, Benchmark] = {benchmark.name: benchmark for benchmark in _ALL}


def find_benchmark(name: str) -> Benchmark:
    """The benchmark of that name.

    Raises:
      UserError: there is none; names the nearest.
    """
    if name not in BENCHMARKS:
        raise UserError(f"no benchmark {name!r}; did you mean {nearest(name, BENCHMARKS)}? ({', '.join(BENCHMARKS)})")
    return BENCHMARKS[name]
