"""Without storyboards: the paper's ablation.

emu-jax train --config configs/ablations/no_storyboards.py:7b …

The paper, with a 7B LLM, without -> with YT-Storyboard-1B [N]: COCO captions 110.8 -> 112.9 CIDEr, MSVD-QA 16.9 ->
17.9, MSRVTT-QA with 4 shots 19.9 -> 20.8. Expect of `mini` the opposite, 0.57, 0.43 and 0.47 (the base: 0.35, 0.22 and
0.47): its storyboards are fifteen pieces of one video, in place of pairs.
"""

from ml_collections import ConfigDict

from configs.ablations import base


def get_config(size: str = "mini") -> ConfigDict:
    """The base with their weight at 0; the other sources take their places."""
    config = base.get_config(size)
    config.data.mixture.storyboard.weight = 0
    return config
