"""Emu2's shape beside Emu's ("Generative Multimodal Models are In-Context Learners", arXiv 2312.13286).

emu-jax train --config configs/emu2.py --workdir runs/emu2
emu-jax train --config configs/emu2.py:decoder --workdir runs/emu2/unet
emu-jax inspect --config configs/emu2.py:37b

What differs from Emu: an image is its pooled patches, projected linearly, without a Causal Transformer; 64 of them in
the published model. The decoder learns to restore an image from its own embeddings (`encoded_share=1`) and never sees
generated ones. The objective is the same.
"""

from ml_collections import ConfigDict

from configs import decoder as decoders
from configs import models, quickstart
from emu_jax.config import choose


def mini() -> ConfigDict:
    """The quick start's Emu with 16 pooled embeddings of 4 patches each."""
    config = quickstart.get_config()
    config.model.vision.patch_size = 8
    config.model.causal.update({"kind": "pooled", "queries": 16})
    config.data.row_tokens = 128  # as many captions as in 96 with 8 embeddings
    return config


def decoder() -> ConfigDict:
    """The quick start's U-Net as an autoencoder: every condition is the image's own embeddings."""
    config = decoders.mini()
    config.online.update({"model": "runs/emu2", "vae": "emu-mini/vae"})
    config.loss.encoded_share = 1.0
    config.data.source = "fluent_emoji"
    return config


def published() -> ConfigDict:
    """EVA-02-CLIP-E-plus (64 layers), 64 embeddings and LLaMA-33B, by the sizes in their papers; only the model."""
    model = models.emu_14b()
    model.vision.update({"image_size": 448, "width": 1792, "layers": 64, "heads": 16, "mlp_dim": 15360})
    model.causal.update({"kind": "pooled", "queries": 64})
    model.llama.update({"width": 6656, "layers": 60, "heads": 52, "mlp_dim": 17920})
    return ConfigDict({"model": model})


VARIANTS = {"mini": mini, "decoder": decoder, "37b": published}


def get_config(variant: str = "mini") -> ConfigDict:
    """One of `VARIANTS`."""
    return choose(VARIANTS, variant, __file__)
