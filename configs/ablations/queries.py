"""The number of queries, which is the number of embeddings of an image: 8, 32 (published) or 64.

emu-jax train --config configs/ablations/queries.py:micro-32 …       # or micro-64; the base has 8
emu-jax train --config configs/ablations/queries.py:micro-32-compute …
emu-jax train --config configs/ablations/queries.py:7b-8 …           # or 7b-64; the base has 32

`micro` rows grow with the number of queries, so that a batch has as many documents as the base's. `-compute` has the
base's training FLOPs instead of its steps. `7b` rows stay at 2,048 tokens; `emu-jax inspect-data` advises on the images
of a row. The paper has no numbers.
"""

import functools

from ml_collections import ConfigDict

from configs.ablations import base
from emu_jax.config import choose

# Q -> tokens of a row: a document of the embedded pairs has 10 tokens and Q.
ROW_TOKENS = {32: 96 * (32 + 10) // 18, 64: 96 * (64 + 10) // 18}
# Q -> FLOPs of a step, divided by those of a step of the base (`models/flops.py`; 8 rows, 4 images each).
STEP_FLOPS = {32: 2.174, 64: 3.941}


def with_queries(size: str, queries: int, equal: str = "steps") -> ConfigDict:
    """The base with another number of queries, and equal "steps" or "compute"."""
    config = base.get_config(size)
    config.model.causal.queries = queries
    if size == "micro":
        config.data.row_tokens = ROW_TOKENS[queries]
        config.model.llama.context = 512
    if equal == "compute":
        config.train.steps = round(config.train.steps / STEP_FLOPS[queries])
    return config


VARIANTS = {
    f"{size}-{queries}": functools.partial(with_queries, size, queries)
    for size, queries in (("7b", 8), ("7b", 64), ("micro", 32), ("micro", 64))
} | {f"micro-{queries}-compute": functools.partial(with_queries, "micro", queries, "compute") for queries in (32, 64)}


def get_config(variant: str = "micro-32") -> ConfigDict:
    """One of `VARIANTS`."""
    return choose(VARIANTS, variant, __file__)
