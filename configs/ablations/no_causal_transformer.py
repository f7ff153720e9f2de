"""Without the Causal Transformer: patches are pooled into Q groups and projected linearly.

emu-jax train --config configs/ablations/no_causal_transformer.py:micro …

`micro` has 8 groups of 2 patches, `7b` has 32 groups of 8. The paper has no numbers.
"""

from ml_collections import ConfigDict

from configs.ablations import base


def get_config(size: str = "micro") -> ConfigDict:
    """The base with `models/causal.py:PooledPatches`."""
    config = base.get_config(size)
    config.model.causal.kind = "pooled"
    return config
