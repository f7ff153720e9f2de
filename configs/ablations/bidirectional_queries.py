"""Queries that attend to all queries, not only to earlier ones.

emu-jax train --config configs/ablations/bidirectional_queries.py:micro …

The relative-position bias is the one of T5's encoder, with half of its buckets for later positions. The number of
parameters stays the same. The paper has no numbers.
"""

from ml_collections import ConfigDict

from configs.ablations import base


def get_config(size: str = "micro") -> ConfigDict:
    """The base without the causal mask."""
    config = base.get_config(size)
    config.model.causal.kind = "bidirectional"
    return config
