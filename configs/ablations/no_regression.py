"""Without the regression loss: images are read, none is predicted.

emu-jax train --config configs/ablations/no_regression.py:mini …

Embeddings that such a model generates mean nothing: its regression head never learns. The paper has no numbers for
this; expect of `mini` 0.57, 0.00 and -2.02 (the base: 0.35, 0.22 and 0.47).
"""

from ml_collections import ConfigDict

from configs.ablations import base


def get_config(size: str = "mini") -> ConfigDict:
    """The base with its weight at 0."""
    config = base.get_config(size)
    config.model.regression_loss_weight = 0.0
    return config
