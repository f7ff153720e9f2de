"""Emu (Generative Pretraining in Multimodality) in JAX: `from emu_jax import Emu`."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from emu_jax.generate.model import Emu

__all__ = ["Emu"]


def __getattr__(name: str) -> Any:
    # Lazy: `import emu_jax.errors` should not import JAX.
    if name == "Emu":
        from emu_jax.generate.model import Emu

        return Emu
    raise AttributeError(f"module 'emu_jax' has no attribute {name!r}")
