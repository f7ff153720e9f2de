"""Without storyboards: the paper's ablation.

emu-jax train --config configs/ablations/no_storyboards.py:micro …
emu-jax train --config configs/ablations/no_storyboards.py:7b …

The paper, with a 7B LLM, without -> with YT-Storyboard-1B [N]: COCO captions 110.8 -> 112.9 CIDEr, MSVD-QA 16.9 ->
17.9, 4-shot MSRVTT-QA 19.9 -> 20.8.
"""

from ml_collections import ConfigDict

from configs.ablations import base
from emu_jax.config import choose

# Pairs of 64 batches with storyboards and without them, by `emu-jax inspect-data --json`.
PAIRS_WITH, PAIRS_WITHOUT = 2156, 2310


def micro() -> ConfigDict:
    """The base without storyboards, for as many pairs. That is fewer steps: pairs take the storyboards' room."""
    config = same_steps("micro")
    config.train.steps = round(config.train.steps * PAIRS_WITH / PAIRS_WITHOUT)
    return config


def same_steps(size: str) -> ConfigDict:
    """The base with a storyboard weight of 0; the other sources fill the batches."""
    config = base.get_config(size)
    config.data.mixture.storyboard.weight = 0
    return config


VARIANTS = {"micro": micro, "micro-steps": lambda: same_steps("micro"), "7b": lambda: same_steps("7b")}


def get_config(variant: str = "micro") -> ConfigDict:
    """One of `VARIANTS`."""
    return choose(VARIANTS, variant, __file__)
