"""The weight of the regression loss, with a text loss weight of 1; the paper's value is not published.

emu-jax train --config configs/ablations/regression_weight.py:micro-1 …    # or micro-16; the base has 4
emu-jax train --config configs/ablations/regression_weight.py:7b-0.25 …    # or 7b-4; the base has 1 (inferred)
"""

import functools

from ml_collections import ConfigDict

from configs.ablations import base
from emu_jax.config import choose


def with_weight(size: str, weight: float) -> ConfigDict:
    """The base with another weight."""
    config = base.get_config(size)
    config.model.regression_loss_weight = weight
    return config


PAIRS = (("micro", 1.0), ("micro", 16.0), ("7b", 0.25), ("7b", 4.0))
VARIANTS = {f"{size}-{weight:g}": functools.partial(with_weight, size, weight) for size, weight in PAIRS}


def get_config(variant: str = "micro-1") -> ConfigDict:
    """One of `VARIANTS`."""
    return choose(VARIANTS, variant, __file__)
