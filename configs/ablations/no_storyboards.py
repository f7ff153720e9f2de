"""Without storyboards: the paper's ablation.

emu-jax train --config configs/ablations/no_storyboards.py:7b …

The paper, with a 7B LLM, without -> with YT-Storyboard-1B [N]: COCO captions 110.8 -> 112.9 CIDEr, MSVD-QA 16.9 ->
17.9, 4-shot MSRVTT-QA 19.9 -> 20.8. `mini` gives the opposite, 0.57, 0.43 and 0.47 (base: 0.35, 0.22 and 0.47): its
storyboards are fifteen pieces of one video, and they replace pairs.
"""

from ml_collections import ConfigDict

from configs.ablations import base


def get_config(size: str = "mini") -> ConfigDict:
    """The base with a storyboard weight of 0; the other sources fill the batches."""
    config = base.get_config(size)
    config.data.mixture.storyboard.weight = 0
    return config
