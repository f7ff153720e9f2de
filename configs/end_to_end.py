"""Emu learns through its visual decoder: the U-Net's diffusion loss beside the two others (docs/visual-heads.md).

emu-jax train --config configs/end_to_end.py --workdir runs/end-to-end
emu-jax train --config configs/end_to_end.py:dreamllm --workdir runs/dreamllm      # learnt queries, no regression

The run draws with its own U-Net: `emu-jax generate --model runs/end-to-end --prompt "cat" --out cat.png`.
"""

from ml_collections import ConfigDict

from configs import decoder, quickstart
from emu_jax.config import choose


def mini() -> ConfigDict:
    """The quick start's Emu, and a fresh U-Net that trains with it over the latents of emu-mini's VAE."""
    config = quickstart.get_config()
    drawing = decoder.mini()
    config.objective = "end_to_end"
    config.init.update({"unet": "", "vae": "emu-mini/vae"})
    for group in ("unet", "schedule"):
        config[group] = drawing[group]
    config.vae = ConfigDict({})  # of config.init.vae
    config.latent_size = config.queries = 0  # of the model
    config.drawing_loss = ConfigDict({"weight": 1.0, "images": 1, "min_snr": 5.0})
    config.optimizer.learning_rate.unet = drawing.optimizer.learning_rate.unet
    return config


def dreamllm() -> ConfigDict:
    """Learnt queries, which only the decoder's loss teaches; the U-Net is emu-mini's, and frozen."""
    config = mini()
    config.model.visual_head.name = "queries"
    config.model.regression_loss_weight = 0.0
    config.init.unet = "emu-mini/unet"
    config.unet.block_channels = (96, 112)
    config.optimizer.learning_rate.unet = 0.0
    return config


VARIANTS = {"mini": mini, "dreamllm": dreamllm}


def get_config(variant: str = "mini") -> ConfigDict:
    """One of `VARIANTS`."""
    return choose(VARIANTS, variant, __file__)
