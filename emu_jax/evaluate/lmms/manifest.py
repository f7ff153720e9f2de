"""What lmms-eval finds by the entry point `lmms_eval.models`.

It loads the entry points of every installed package whichever model it runs, so JAX is not imported here.
"""

from __future__ import annotations

from lmms_eval.models.registry_v2 import ModelManifest

MODULE = "emu_jax.evaluate.lmms.model"


def manifest() -> ModelManifest:
    """The model `emu_jax` of both kinds: lmms-eval takes the chat one unless `--force_simple` is given."""
    return ModelManifest("emu_jax", simple_class_path=f"{MODULE}.SimpleEmu", chat_class_path=f"{MODULE}.ChatEmu")
