"""emu-mini, the model in the box: the quick start's recipe, with more steps and an EMA.

launch/emu_mini.sh            # all four configs, one after another; by estimate four hours on 2 CPU cores; resumable

The VAE compares images by what VGG-16 sees, too, which keeps texture. The scores are on the model's card,
emu_jax/checkpoints/emu-mini/README.md.
"""

from ml_collections import ConfigDict

from configs import decoder as decoders
from configs import instruct, quickstart
from configs import vae as vaes
from emu_jax.config import choose


def emu() -> ConfigDict:
    """The model itself: 2.3 M parameters. Three of ten documents are the chats' questions, as plain text."""
    config = quickstart.get_config()
    config.data.mixture.images.weight, config.data.mixture.questions.weight = 7.0, 3.0
    # Training images are soon known by heart; these make what is learnt hold for others.
    config.model.vision.drop_path = config.model.causal.dropout = 0.1
    config.optimizer.update({"weight_decay": 0.5, "ema_decay": 0.999})
    _run(config, steps=30_000)
    return config


def vae() -> ConfigDict:
    """64 x 64 pixels to 8 x 8 latents of 8 channels, and back."""
    config = vaes.get_config()
    config.vae.update({"block_channels": (16, 32, 64, 96), "latent_channels": 8})
    config.loss.update({"perceptual_weight": 0.3, "perceptual_blocks": 3, "perceptual_crop": 32})
    config.optimizer.ema_decay = 0.997
    _run(config, steps=3_000)
    return config


def unet() -> ConfigDict:
    """Draws latents from embeddings."""
    config = decoders.mini()
    config.unet.block_channels = (96, 112)  # wider ones would not fit into 20 MB with the rest
    config.optimizer.update({"learning_rate": ConfigDict({"unet": 1e-3}), "ema_decay": 0.9995})
    _run(config, steps=10_000)
    return config


def chat() -> ConfigDict:
    """Low-rank adapters for chats about the embedded images."""
    config = instruct.mini()
    config.init.emu = config.tokenizer.path = "runs/emu-mini"
    config.optimizer.ema_decay = 0.999
    _run(config, steps=5_000)
    return config


def _run(config: ConfigDict, steps: int) -> None:
    config.train.update({"steps": steps, "minutes": 0.0, "log_every": 50, "checkpoint_every": 500})


VARIANTS = {"emu": emu, "vae": vae, "unet": unet, "chat": chat}


def get_config(variant: str = "emu") -> ConfigDict:
    """One of `VARIANTS`."""
    return choose(VARIANTS, variant, __file__)
