"""Without the regression loss: images are read, never predicted.

emu-jax train --config configs/ablations/no_regression.py:micro …

The regression head never learns, so the embeddings that this model generates are meaningless. The paper has no numbers.
"""

from ml_collections import ConfigDict

from configs.ablations import base


def get_config(size: str = "micro") -> ConfigDict:
    """The base with a regression weight of 0."""
    config = base.get_config(size)
    config.model.regression_loss_weight = 0.0
    return config
