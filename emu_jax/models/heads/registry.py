"""The visual heads by name, for `config.model.visual_head.name`.

A package adds heads by the entry point group `emu_jax.visual_heads`: name -> `module:Class`, a `VisualHead`.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from typing import Any

from emu_jax.errors import UserError, build, nearest
from emu_jax.models.heads.codes import Codes
from emu_jax.models.heads.flow import Flow
from emu_jax.models.heads.head import VisualHead
from emu_jax.models.heads.queries import Queries
from emu_jax.models.heads.regression import DISTANCES, Cosine, InfoNCE, Regression

ENTRY_POINTS = "emu_jax.visual_heads"
PUBLISHED = Regression("l2")
HEADS: dict[str, type[VisualHead]] = {
    **dict.fromkeys(DISTANCES, Regression),
    "cosine": Cosine,
    "infonce": InfoNCE,
    "flow": Flow,
    "codes": Codes,
    "queries": Queries,
}


def head_names() -> list[str]:
    """The names of all heads, those of other packages included."""
    return list(dict.fromkeys([*HEADS, *importlib.metadata.entry_points(group=ENTRY_POINTS).names]))


def build_head(where: str, fields: Mapping[str, Any]) -> VisualHead:
    """The head of a group of settings at `where`: its `name`, and fields of that head that are not as by default.

    Raises:
      UserError: there is no such head, it has no such field, or it refuses the value.
    """
    name = fields["name"] if hasattr(fields, "keys") and "name" in fields else None
    if not isinstance(name, str):
        raise UserError(f"{where}.name is missing; expected the name of a visual head, as in {where}.name=l2")
    if name not in head_names():
        raise UserError(f"{where}.name={name!r} is no visual head; did you mean {nearest(name, head_names())}?")
    added = importlib.metadata.entry_points(group=ENTRY_POINTS)
    head = HEADS.get(name) or added[name].load()
    if not (isinstance(head, type) and issubclass(head, VisualHead)):
        raise UserError(f"{where}.name={name!r}: {added[name].value} is no VisualHead; mend the package that adds it")
    return build(head, where, dict(fields))
