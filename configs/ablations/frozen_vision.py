"""A frozen vision encoder (with ln_visual): no gradient, no weight decay, no optimizer state.

emu-jax train --config configs/ablations/frozen_vision.py:micro --config.init.vision=runs/ablations/base-0 …
emu-jax train --config configs/ablations/frozen_vision.py:micro-random …
emu-jax train --config configs/ablations/frozen_vision.py:7b …        # EVA-CLIP, like the base

A frozen encoder must have been trained before. At `micro` size there is no EVA-CLIP, so the encoder comes from a
finished run of the base and the rest starts fresh. That encoder has already seen these images and names for a whole
run. `micro-random` freezes an untrained encoder. The paper has no numbers.
"""

from ml_collections import ConfigDict

from configs.ablations import base
from emu_jax.config import choose


def micro() -> ConfigDict:
    """The encoder of a finished base run."""
    config = random("micro")
    config.init.vision = base.FINISHED
    return config


def random(size: str = "micro") -> ConfigDict:
    """The encoder as initialised; at `7b` that is EVA-CLIP."""
    config = base.get_config(size)
    config.optimizer.learning_rate.vision = 0.0
    return config


VARIANTS = {"micro": micro, "micro-random": random, "7b": lambda: random("7b")}


def get_config(variant: str = "micro") -> ConfigDict:
    """One of `VARIANTS`."""
    return choose(VARIANTS, variant, __file__)
