"""The run-time check of array types: importing this module applies it to the modules that are imported afterwards.

Functions under `jax.jit` are checked once, while they are traced. Not checked are functions without array types, whose
mappings may be ConfigDicts and whose values `UserError`s describe, and `__init__`: JAX builds dataclass pytrees
(`emu.Batch`, `KVCache`) with shardings or specifications in place of arrays.
"""

import typing
from collections.abc import Callable
from typing import Any

from beartype import BeartypeConf, beartype
from jaxtyping import AbstractArray, install_import_hook

CHECKED = ["emu_jax.models"]
_check = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int serves as a float


def check(function: Callable) -> Callable:
    """The function, with its arguments and its result checked at every call."""
    has_arrays = any(map(_is_array, function.__annotations__.values()))
    return _check(function) if has_arrays and function.__name__ != "__init__" else function


def _is_array(annotation: Any) -> bool:
    if isinstance(annotation, type) and issubclass(annotation, AbstractArray):
        return True
    return any(map(_is_array, typing.get_args(annotation)))


install_import_hook(CHECKED, f"{__name__}.{check.__name__}")
