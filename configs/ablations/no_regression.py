"""Without the regression loss: images are read, never predicted.

emu-jax train --config configs/ablations/no_regression.py:mini …

The regression head never learns, so the embeddings that this model generates are meaningless. The paper has no numbers;
`mini` gives 0.57, 0.00 and -2.02 (base: 0.35, 0.22 and 0.47).
"""

from ml_collections import ConfigDict

from configs.ablations import base


def get_config(size: str = "mini") -> ConfigDict:
    """The base with a regression weight of 0."""
    config = base.get_config(size)
    config.model.regression_loss_weight = 0.0
    return config
