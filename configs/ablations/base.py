"""The base of the ablations: every other config in this folder is `base` with a few other values.

launch/ablations.sh                  # at `mini` size: data, every ablation with three seeds, one table
emu-jax train --config configs/ablations/base.py:mini --workdir runs/ablations/base-0 \\
    --config.data.mixture.storyboard.source=runs/ablations/data/bunny
emu-jax train --config configs/ablations/base.py:7b …        # like configs/pretrain.py:7b; see its docstring

The paper ablates only the storyboards, with a 7B LLM; no_storyboards.py has its numbers. `mini` measured on
heldout_combinations (seeds 0 to 2): captions exactly right 0.29, 0.30 and 0.44; right image in the top 5 of 3,372 for
0.26, 0.14 and 0.26 of the names; autoregressive R2 0.49, 0.41 and 0.50. The last two use each model's own embeddings:
embeddings that tell less about an image are easier to predict, so R2 can be higher. The other files give the same three
figures as means over three seeds; docs/ablations.md has intervals. In all these runs every storyboard image was
predicted and none was read, and all pieces of a storyboard were used; the runs are to be repeated.
"""

from ml_collections import ConfigDict

from configs import pretrain, quickstart
from emu_jax.config import choose


def mini() -> ConfigDict:
    """The quick start's model for 1,500 steps, on the embedded pairs and the storyboards of one video.

    One sample in 65 is a storyboard: a window of as many frames, with their narration, as fit a row. In half of these
    samples the frames are predicted, in the other half they are read. In the paper's mixture one in 22 is a storyboard
    (16 of 352 [N]), but here there are only 15 of them. Every seed reads the same batches; only the initial parameters
    differ.
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
