"""Queries that see one another both ways, not only those before them.

emu-jax train --config configs/ablations/bidirectional_queries.py:mini …

The relative-position bias is T5's for encoders: half of its buckets for what comes later. No parameter more or less.
The paper has no numbers for this; expect of `mini` 0.37, 0.25 and 0.49 (the base: 0.35, 0.22 and 0.47).
"""

from ml_collections import ConfigDict

from configs.ablations import base


def get_config(size: str = "mini") -> ConfigDict:
    """The base without the causal mask."""
    config = base.get_config(size)
    config.model.causal.kind = "bidirectional"
    return config
