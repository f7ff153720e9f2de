"""Models that a wheel carries, by name: `Emu.load("emu-mini")`.

Their folders are packed checkpoints (`packed.py`) with a model card, scores and curves.
"""

from __future__ import annotations

import os
import pathlib

from emu_jax.errors import UserError
from emu_jax.storage import Path, as_path

CURVES_FILE = "curves.jsonl"  # some rows of the metrics of the run that made a shipped model
DEFAULT = "emu-mini"
MODELS = {DEFAULT: pathlib.Path(__file__).parent / DEFAULT}


def model_path(path: str | os.PathLike[str]) -> Path:
    """The path of a model that a user names: a shipped model, a part of one ("emu-mini/chat"), or a path.

    A file or folder of a shipped model's name is found by "./emu-mini".

    Raises:
      UserError: this installation lacks the shipped model.
    """
    name, _, part = os.fspath(path).partition("/")
    if name not in MODELS:
        return as_path(path)
    if not MODELS[name].is_dir():
        raise UserError(f"{name}: this installation carries no such model; for a folder of that name say ./{name}")
    return MODELS[name] / part


def is_shipped(path: Path) -> bool:
    """Whether a path is in a shipped model's folder, where nothing may be written."""
    return any(folder in (path, *path.parents) for folder in MODELS.values())
