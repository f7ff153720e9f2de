"""Without the Causal Transformer: patches are pooled into as many groups as there were queries, and projected linearly.

emu-jax train --config configs/ablations/no_causal_transformer.py:mini …

At `mini` size 8 groups of 2 patches, at `7b` 32 of 8. The paper has no numbers for this; expect of `mini` 0.60, 0.23
and 0.32 (the base: 0.35, 0.22 and 0.47).
"""

from ml_collections import ConfigDict

from configs.ablations import base


def get_config(size: str = "mini") -> ConfigDict:
    """The base with `models/causal.py:PooledPatches`."""
    config = base.get_config(size)
    config.model.causal.kind = "pooled"
    return config
