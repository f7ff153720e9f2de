"""EVA-CLIP-g (`EVA01_CLIP_g_14_plus`) -> a conversion to the vision encoder.

In: the file of the whole CLIP model, or of its visual tower. Emu's vision encoder is that tower under the same keys
(`emu_keys.py`); the text tower, the final norm and the head are not used.
"""

from __future__ import annotations

import re

from emu_jax.checkpoints.convert import emu
from emu_jax.checkpoints.convert.conversion import Conversion, source_dtypes, unreadable
from emu_jax.checkpoints.convert.tensor_files import Tensors

LAYOUT = "EVA-CLIP's layout"
TOWER = "visual."
OTHER = re.compile(r"(text\.|logit_scale$|logit_bias$)")  # CLIP's tensors beside its visual tower


def is_eva_clip(tensors: Tensors) -> bool:
    """Whether a file holds EVA-CLIP's visual tower and not a whole Emu."""
    return any(name.startswith(TOWER) for name in tensors) and not any(name.startswith("decoder.") for name in tensors)


def conversion(tensors: Tensors, *, vision_head_dim: int = emu.VISION_HEAD_DIM) -> Conversion:
    """Converts the visual tower to our vision encoder; UserError lists everything that does not fit."""
    unused = [name for name in tensors if OTHER.match(name)]
    faults = tuple(fault for fault in unreadable(tensors) if not OTHER.match(fault.name))
    matched = emu.match(
        {name: shape for name, shape in tensors.shapes.items() if not OTHER.match(name)},
        where=str(tensors.path),
        vision_head_dim=vision_head_dim,
        faults=faults,
        scope=lambda path: path.startswith("vision/"),
        layout=LAYOUT,
    )
    shapes = {f"params/{path}": shape for path, shape in matched.targets.items()}
    axes = {f"params/{path}": logical for path, logical in matched.axes.items()}
    about = {
        "format": "eva_clip",
        "unused": [*unused, *matched.unused],
        "beside": list(tensors.beside),
        "dtypes": source_dtypes(tensors, matched.names),
    }
    config = {"model": {"vision": matched.config["vision"]}}
    return Conversion(tensors, "vision", config, shapes, tuple(emu.assign(matched, tensors)), axes=axes, about=about)
