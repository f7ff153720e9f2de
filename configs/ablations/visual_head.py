"""Another visual head than l2 regression (`docs/visual-heads.md`).

ABLATIONS='head_l2 head_flow' launch/ablations.sh runs/heads            # trains, draws, scores and compares `drawn`
emu-jax train --config configs/ablations/visual_head.py:drawn-flow …
emu-jax train --config configs/ablations/visual_head.py:7b-flow …

`drawn` puts the heads beside each other: all predict the same embeddings, those of emu-mini's frozen encoder, so that
emu-mini's U-Net draws what each predicts, and no head can make its task easier. `micro` and `7b` train the encoder too,
as the base does. The paper has no numbers.
"""

import functools

from ml_collections import ConfigDict

from configs import quickstart
from configs.ablations import base
from emu_jax.config import choose

HEADS = ("l2", "l1", "smooth_l1", "cosine", "infonce", "flow", "codes", "queries")


def drawn() -> ConfigDict:
    """The quick start's data and language model, which learns from scratch over emu-mini's frozen encoder."""
    config = quickstart.get_config()
    config.init.encoder = config.tokenizer.path = "emu-mini"
    config.optimizer.learning_rate.update({"vision": 0.0, "causal": 0.0})
    config.train.update({"steps": 2000, "log_every": 50, "checkpoint_every": 2000})
    config.eval.update({"every": 500})
    return config


def with_head(size: str, name: str) -> ConfigDict:
    """The base, or `drawn`, with another visual head and its default settings."""
    config = drawn() if size == "drawn" else base.get_config(size)
    config.model.visual_head.name = name
    if size == "drawn" and name == "codes":
        config.init.codebook = "runs/heads/codebook"  # of configs/codebook.py
    return config


VARIANTS = {
    f"{size}-{name}": functools.partial(with_head, size, name)
    for size in ("drawn", "micro", "7b")
    for name in HEADS
    if size == "drawn" or name != "l2"
}


def get_config(variant: str = "drawn-flow") -> ConfigDict:
    """One of `VARIANTS`."""
    return choose(VARIANTS, variant, __file__)
