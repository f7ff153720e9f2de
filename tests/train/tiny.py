"""The debug model on a dozen drawn images: an experiment for this folder's tests.

`get_config` takes no data; `draw` writes them, and `--config.data.source=…` names them.
"""

import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from configs import decoder, models, quickstart, vae
from emu_jax import Emu
from emu_jax.generate.precompute import PrecomputeConfig, precompute
from emu_jax.storage import replace_text
from emu_jax.train.loop import train

DOCUMENTS = "documents.jsonl"
COLOURS = {"red": (220, 40, 30), "green": (40, 170, 60), "blue": (30, 70, 210)}
SHAPES = {"square": np.s_[4:12, 4:12], "bar": np.s_[6:10, :], "frame": np.s_[::15, :], "cross": np.s_[:, 7:9]}


def get_config() -> ConfigDict:
    """Eight steps, with everything on that could make a resumed run differ: dropout, running statistics."""
    config = quickstart.get_config()
    config.model = models.debug()
    config.model.causal.dropout = 0.1
    config.model.standardise = True
    config.model.llama.vocab_size = 0
    config.data.source, config.data.mixture = "fluent_emoji", ConfigDict()
    config.tokenizer.update({"vocab_size": 300, "model_type": "bpe", "also": ()})
    config.data.update({"row_tokens": 64, "row_images": 8, "batch_rows": 8, "packing_window": 8})
    config.train.update({"steps": 8, "minutes": 0.0, "log_every": 1, "checkpoint_every": 3})
    return config


def vae_config(source: Path) -> ConfigDict:
    """Two steps of a VAE over 16 x 16 images."""
    config = vae.get_config()
    config.image_size = 16
    config.vae.update({"block_channels": (8, 8), "latent_channels": 2, "groups": 4})
    config.data.update({"source": str(source), "batch": 4})
    config.train.update({"steps": 2, "minutes": 0.0, "log_every": 1, "checkpoint_every": 1})
    return config


def decoder_config(latents: Path) -> ConfigDict:
    """Two steps of a U-Net."""
    config = decoder.get_config()
    config.unet.update({"block_channels": (8, 8), "attention_blocks": (True, False), "heads": 2, "groups": 4})
    config.data.update({"source": str(latents), "batch": 4})
    config.train.update({"steps": 2, "minutes": 0.0, "log_every": 1, "checkpoint_every": 1})
    return config


def instruct_config(source: Path, begin: Path) -> ConfigDict:
    """Two steps of adapters, beside projections of attention and of the MLP, on a run of this file's `get_config`."""
    config = get_config()
    config.objective = "instruct"
    config.init = ConfigDict({"emu": str(begin), "llama": "", "vision": ""})
    config.model.llama.update({"lora_rank": 2, "lora_alpha": 4.0, "lora_dropout": 0.1})
    config.model.llama.lora_targets = ("q", "v", "down")
    config.model.causal.dropout = 0.0
    config.model.regression_loss_weight = 0.0
    config.data.source = str(source)
    config.optimizer.learning_rate = ConfigDict({"llama": 1e-2})
    config.train.update({"steps": 2, "minutes": 0.0, "log_every": 1, "checkpoint_every": 1})
    return config


def that_draws(model: Emu) -> Emu:
    """The model with other output weights: wherever it answers, it begins an image at once."""
    config = dataclasses.replace(model.config, learn_image_token=True)
    for sign in (1.0, -1.0):  # one of the two makes [IMG] likelier than the other tokens, whose logits are 0
        kernel = np.zeros(model.params["llama"]["lm_head"]["kernel"].shape, np.float32)
        kernel[:, model.tokenizer.img_id] = sign
        llama = model.params["llama"] | {"lm_head": {"kernel": jnp.asarray(kernel)}}
        changed = Emu(config, model.params | {"llama": llama}, model.statistics, model.tokenizer, model.decoder)
        if changed.chat("").say("a red bar", max_new_tokens=1).ended_by == "image":
            return changed
    raise AssertionError("neither sign makes [IMG] the likeliest token")


def pairs(documents: Path) -> Path:
    """The pairs among the documents: those that hold an image and a text before it."""
    path = documents.with_name("pairs.jsonl")
    lines = [line for line in documents.read_text(encoding="utf-8").splitlines() if "parts" not in json.loads(line)]
    replace_text(path, "\n".join(lines) + "\n")  # whole, whoever reads it meanwhile
    return path


def train_decoder(workdir: Path, documents: Path) -> None:
    """Adds vae, latents and unet to a pretraining run's work directory."""
    source = pairs(documents)
    train(vae_config(source), workdir / "vae")
    precompute(workdir, workdir / "vae", workdir / "latents", PrecomputeConfig(str(source), ""))
    train(decoder_config(workdir / "latents"), workdir / "unet")


def draw(folder: Path) -> Path:
    """Writes images and a JSONL of documents with no, one and two of them; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for name, colour in COLOURS.items():
        for shape, window in SHAPES.items():
            pixels = np.full((16, 16, 3), 255, np.uint8)
            pixels[window] = colour
            Image.fromarray(pixels).save(folder / f"{name}-{shape}.png")
            lines.append({"image": f"{name}-{shape}.png", "text": f"a {name} {shape}"})
    lines.append({"parts": [{"text": "only words here"}]})
    lines.append({"parts": [{"image": "red-bar.png"}, {"text": "then a cross"}, {"image": "blue-cross.png"}]})
    path = folder / DOCUMENTS
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path
