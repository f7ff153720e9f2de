"""A training run of the debug size on a dozen drawn pictures, for the tests of this folder.

    python tests/train/tiny_run.py WORKDIR [--die-at STEP] [--config.a.b=value …]

trains in WORKDIR, and with --die-at kills its own process with SIGKILL right after that step was dispatched.
"""

import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from configs import models, quickstart
from emu_jax.config import apply_overrides
from emu_jax.train import loop

COLOURS = {"red": (220, 40, 30), "green": (40, 170, 60), "blue": (30, 70, 210)}
SHAPES = ("square", "bar", "frame", "cross")


def draw(folder: Path) -> Path:
    """Writes twelve pictures and a JSONL of documents with no, one and two pictures; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for name, colour in COLOURS.items():
        for shape in SHAPES:
            pixels = np.full((16, 16, 3), 255, np.uint8)
            window = {
                "square": np.s_[4:12, 4:12],
                "bar": np.s_[6:10, :],
                "frame": np.s_[::15, :],
                "cross": np.s_[:, 7:9],
            }[shape]
            pixels[window] = colour
            Image.fromarray(pixels).save(folder / f"{name}-{shape}.png")
            lines.append({"image": f"{name}-{shape}.png", "text": f"a {name} {shape}"})
    lines.append({"parts": [{"text": "only words here"}]})
    lines.append({"parts": [{"image": "red-bar.png"}, {"text": "then a cross"}, {"image": "blue-cross.png"}]})
    path = folder / "documents.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def tiny_config(data: Path, overrides: list[str] = ()) -> ConfigDict:
    """Eight steps of the debug model with dropout and standardisation, so that everything that could differ is on."""
    config = quickstart.get_config()
    config.model = models.debug()
    config.model.causal.dropout = 0.1
    config.model.standardise = True
    config.model.llama.vocab_size = 0
    config.tokenizer.update({"vocab_size": 300, "model_type": "bpe"})
    config.data.update({"source": str(data), "row_tokens": 48, "row_images": 3, "batch_rows": 8, "packing_window": 8})
    config.train.update({"steps": 8, "minutes": 0.0, "log_every": 1, "checkpoint_every": 3})
    apply_overrides(config, overrides)
    return config
