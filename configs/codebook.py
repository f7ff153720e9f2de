"""A vector quantiser of a trained Emu's visual embeddings, for the visual head `codes` (docs/visual-heads.md).

emu-jax train --config configs/codebook.py --workdir runs/codebook
emu-jax train --config configs/quickstart.py --workdir runs/codes --config.model.visual_head.name=codes \\
    --config.init.codebook=runs/codebook --config.init.encoder=emu-mini --config.optimizer.learning_rate.vision=0 \\
    --config.optimizer.learning_rate.causal=0

The codes are those of one encoder: a model that learns to predict them needs that encoder, frozen. For a run of your
own instead of emu-mini, set `config.init.encoder` to its work directory, and `config.model` to its sizes. By estimate
two minutes on 2 CPU cores.
"""

from ml_collections import ConfigDict

from configs import models, vae


def get_config() -> ConfigDict:
    """1,024 codes for each of an image's eight embeddings."""
    config = vae.get_config()
    for group in ("vae", "loss", "image_size"):
        del config[group]
    config.objective = "codebook"
    config.model = models.mini()
    config.init = ConfigDict({"encoder": "emu-mini"})
    config.codebook = ConfigDict({"codes": 1024, "groups": 1, "width": 16, "decay": 0.99, "revive": 0.1})
    config.data.batch = 64
    config.optimizer.learning_rate = ConfigDict({"quantiser": 2e-3})
    config.train.update({"steps": 1000, "log_every": 50, "checkpoint_every": 500})
    return config
