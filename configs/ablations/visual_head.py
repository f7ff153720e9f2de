"""Another visual head than l2 regression (`docs/visual-heads.md`).

emu-jax train --config configs/ablations/visual_head.py:micro-flow …     # l1, smooth_l1, cosine, infonce or flow
emu-jax train --config configs/ablations/visual_head.py:7b-flow …

The paper has no numbers.
"""

import functools

from ml_collections import ConfigDict

from configs.ablations import base
from emu_jax.config import choose

HEADS = ("l1", "smooth_l1", "cosine", "infonce", "flow")


def with_head(size: str, name: str) -> ConfigDict:
    """The base with another visual head and its default settings."""
    config = base.get_config(size)
    config.model.visual_head.name = name
    return config


VARIANTS = {f"{size}-{name}": functools.partial(with_head, size, name) for size in ("micro", "7b") for name in HEADS}


def get_config(variant: str = "micro-flow") -> ConfigDict:
    """One of `VARIANTS`."""
    return choose(VARIANTS, variant, __file__)
