"""A vision encoder (with ln_visual) that does not learn: no gradient, no decay, no optimizer state.

emu-jax train --config configs/ablations/frozen_vision.py:mini --config.init.vision=runs/ablations/base-0 …
emu-jax train --config configs/ablations/frozen_vision.py:mini-random …
emu-jax train --config configs/ablations/frozen_vision.py:7b …        # EVA-CLIP's, as the base begins with

A frozen encoder must have learnt elsewhere. At `mini` size there is no EVA-CLIP: the encoder is that of a finished run
of the base, and the rest begins afresh. So it has seen these very images and their names, for as many steps again;
`mini-random` freezes one that has learnt nothing. The paper has no numbers for this; expect of `mini` 0.56, 0.48 and
0.49, of `mini-random` 0.54, 0.15 and 0.26 (the base: 0.35, 0.22 and 0.47).
"""

from ml_collections import ConfigDict

from configs.ablations import base
from emu_jax.config import choose


def mini() -> ConfigDict:
    """The encoder of a run of the base."""
    config = random("mini")
    config.init.vision = "runs/ablations/base-0"
    return config


def random(size: str = "mini") -> ConfigDict:
    """The encoder as it is drawn; at `7b` the base names EVA-CLIP's."""
    config = base.get_config(size)
    config.optimizer.learning_rate.vision = 0.0
    return config


VARIANTS = {"mini": mini, "mini-random": random, "7b": lambda: random("7b")}


def get_config(variant: str = "mini") -> ConfigDict:
    """One of `VARIANTS`."""
    return choose(VARIANTS, variant, __file__)
