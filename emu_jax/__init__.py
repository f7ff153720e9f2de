"""Emu (Generative Pretraining in Multimodality) in JAX: `from emu_jax import Emu`."""

from typing import Any


def __getattr__(name: str) -> Any:
    # Deferred: `import emu_jax.errors` should not pay for JAX.
    if name == "Emu":
        from emu_jax.generate.model import Emu

        return Emu
    raise AttributeError(f"module 'emu_jax' has no attribute {name!r}")
