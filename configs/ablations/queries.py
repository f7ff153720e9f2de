"""The number of queries, which is the number of embeddings of an image: 8, 32 (published) or 64.

emu-jax train --config configs/ablations/queries.py:mini-32 …        # or mini-64; the base has 8
emu-jax train --config configs/ablations/queries.py:7b-8 …           # or 7b-64; the base has 32

`mini` rows grow with the number of queries, so that a batch has as many documents as the base's. `7b` rows stay at
2,048 tokens; `emu-jax inspect-data` advises on the images of a row. The paper has no numbers; `mini-32` gives 0.20,
0.01 and 0.07, `mini-64` 0.22, 0.01 and 0.01 (base: 0.35, 0.22 and 0.47).
"""

import functools

from ml_collections import ConfigDict

from configs.ablations import base
from emu_jax.config import choose

# Q -> tokens of a row: a document of the embedded pairs has 10 tokens and Q.
ROW_TOKENS = {32: 96 * (32 + 10) // 18, 64: 96 * (64 + 10) // 18}


def with_queries(size: str, queries: int) -> ConfigDict:
    """The base with another number of queries."""
    config = base.get_config(size)
    config.model.causal.queries = queries
    if size == "mini":
        config.data.row_tokens = ROW_TOKENS[queries]
        config.model.llama.context = 512
    return config


SIZES = {("mini", 32), ("mini", 64), ("7b", 8), ("7b", 64)}
VARIANTS = {f"{size}-{queries}": functools.partial(with_queries, size, queries) for size, queries in sorted(SIZES)}


def get_config(variant: str = "mini-32") -> ConfigDict:
    """One of `VARIANTS`."""
    return choose(VARIANTS, variant, __file__)
