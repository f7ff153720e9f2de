"""A model's parameters, quantised at once; the package quantises kernel by kernel as it converts them."""

from collections.abc import Mapping
from typing import Any

from emu_jax.models.paths import flatten, nest
from emu_jax.models.quantise import SCALE, is_quantised, quantise


def quantise_params(params: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Parameters with the kernels of the language model's blocks quantised."""
    found = flatten(params)
    for path in list(found):
        if is_quantised(path):
            found[path], found[f"{path.removesuffix('kernel')}{SCALE}"] = quantise(found[path], kind)
    return nest(found)
