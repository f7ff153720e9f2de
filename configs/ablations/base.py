"""What the ablations change: each file beside this one is `base` with a few fields set otherwise.

launch/ablations.sh                  # at `mini` size: data, every ablation with three seeds, and one table of them all
emu-jax train --config configs/ablations/base.py:mini --workdir runs/ablations/base-0 \\
    --config.data.mixture.storyboard.source=runs/ablations/data/bunny
emu-jax train --config configs/ablations/base.py:7b …        # as configs/pretrain.py:7b, whose docstring gives the rest

The paper ablates the storyboards alone, with a 7B LLM: its numbers are in no_storyboards.py. Of `mini` were measured,
on heldout_combinations: captions exactly right 0.29, 0.30 and 0.44, the right image in the top 5 of 3,372 for 0.26,
0.14 and 0.26 of the names, autoregressive R2 0.49, 0.41 and 0.50 (seeds 0 to 2). The last two are of each model's own
embeddings: where these tell less of an image, they are easier to predict, and R2 can be higher. The files beside this
one have their figures in the same order, as means over three seeds (docs/ablations.md has the intervals). In all these
runs every image of a storyboard was predicted and none was read, and all its pieces were read; they are to be repeated.
"""

from ml_collections import ConfigDict

from configs import pretrain, quickstart
from emu_jax.config import choose


def mini() -> ConfigDict:
    """The quick start's model for 1,500 steps, on the embedded pairs and the storyboards of one video.

    A sample in 65 is of a storyboard: a window of as many frames, and what is said beside them, as a row holds; in half
    of them the frames are predicted, in the others they are read. The paper's mixture has one in 22 (16 of 352 [N]),
    but here are only 15 of them. Every seed reads the same batches: what differs is where parameters begin.
    """
    config = quickstart.get_config()
    config.tokenizer.also = ()
    config.data.source = ""
    config.data.mixture = ConfigDict(
        {
            "pairs": pretrain.source(64) | {"source": "fluent_emoji"},
            "storyboard": pretrain.source(1) | {"source": "runs/ablations/data/bunny"},
        }
    )
    config.train.update({"steps": 1500, "minutes": 0.0, "checkpoint_every": 500, "keep_checkpoints": 1})
    return config


def published() -> ConfigDict:
    """LLaMA-7B, EVA-CLIP-g and the paper's five sources, 10,000 steps."""
    return pretrain.get_config("7b")


SIZES = {"mini": mini, "7b": published}


def get_config(size: str = "mini") -> ConfigDict:
    """One of `SIZES`."""
    return choose(SIZES, size, __file__)
