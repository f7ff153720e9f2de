"""The number of queries, that is of embeddings an image: 8, 32 (published) or 64.

emu-jax train --config configs/ablations/queries.py:mini-32 …        # or mini-64; the base has 8
emu-jax train --config configs/ablations/queries.py:7b-8 …           # or 7b-64; the base has 32

At `mini` size rows grow with the images in them, so that a batch holds as many documents as the base's. At `7b` they
stay 2,048 tokens; `emu-jax inspect-data` advises on the images of a row. The paper has no numbers for this; expect of
`mini-32` 0.20, 0.01 and 0.07, of `mini-64` 0.22, 0.01 and 0.01 (the base: 0.35, 0.22 and 0.47).
"""

import functools

from ml_collections import ConfigDict

from configs.ablations import base
from emu_jax.config import choose

# Q -> what a row must hold: documents of the embedded pairs are 10 tokens and Q.
ROW_TOKENS = {32: 96 * (32 + 10) // 18, 64: 96 * (64 + 10) // 18}


def with_queries(size: str, queries: int) -> ConfigDict:
    """The base with another number of them."""
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
