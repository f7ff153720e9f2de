"""The published objective in place of the one that a small model from scratch needs.

emu-jax train --config configs/ablations/published_objective.py:micro --config.init.vision=runs/ablations/base-0 …
emu-jax train --config configs/ablations/published_objective.py:micro-raw …       # embeddings not standardised
emu-jax train --config configs/ablations/published_objective.py:micro-live …      # gradients through target inputs

As published, the weights of the losses are 1 : 1, every image is read and predicted in either order of a pair, no
gradient is stopped, and the embeddings are not standardised over the batch. It begins from a trained encoder, as Emu
does from EVA-CLIP; here that is a finished base run's. `micro-raw` and `micro-live` change one field of the base each.
`7b` has this objective in its base.
"""

from ml_collections import ConfigDict

from configs.ablations import base
from emu_jax.config import choose


def micro() -> ConfigDict:
    """All of the published objective."""
    config = base.micro()
    config.model.update({"standardise": False, "stop_target_inputs": False, "regression_loss_weight": 1.0})
    config.data.predicted_share = 1.0
    config.data.pairs.update({"text_first_text_weight": 1.0, "image_first_visual_weight": 1.0})
    config.init.vision = base.FINISHED
    return config


def raw() -> ConfigDict:
    """The base without standardised embeddings."""
    config = base.micro()
    config.model.standardise = False
    return config


def live() -> ConfigDict:
    """The base with gradients into the encoder at embeddings that are regression targets."""
    config = base.micro()
    config.model.stop_target_inputs = False
    return config


VARIANTS = {"micro": micro, "micro-raw": raw, "micro-live": live}


def get_config(variant: str = "micro") -> ConfigDict:
    """One of `VARIANTS`."""
    return choose(VARIANTS, variant, __file__)
