"""A config's model as text: its parts, parameters and shapes; no parameter is allocated."""

from __future__ import annotations

import math

import jax
from ml_collections import ConfigDict

from emu_jax.models import emu
from emu_jax.models.flops import forward_flops
from emu_jax.models.quantise import element_bytes


def describe(config: ConfigDict) -> str:
    """A table of `config.model`: every parameter, totals by part, and forward FLOPs of one image and one row."""
    model = emu.EmuConfig.from_dict(config.model)
    tree = emu.abstract(model)
    axes = emu.logical_axes(model)
    lines = [f"{'parameter':52s} {'shape':>22s} {'logical axes':34s} {'count':>16s}"]
    for part, subtree in tree.items():
        leaves = jax.tree_util.tree_leaves_with_path(subtree)
        names = jax.tree.leaves(axes[part], is_leaf=lambda node: isinstance(node, tuple))
        for (path, leaf), logical in zip(leaves, names, strict=True):
            name = "/".join([part, *(key.key for key in path)])
            shape = "x".join(map(str, leaf.shape))
            lines.append(f"{name:52s} {shape:>22s} {' '.join(logical):34s} {math.prod(leaf.shape):>16,}")
    lines.append("")
    leaves = {part: jax.tree.leaves(subtree) for part, subtree in tree.items()}
    counts = {part: sum(math.prod(leaf.shape) for leaf in some) for part, some in leaves.items()}
    sizes = {
        part: sum(math.prod(leaf.shape) * element_bytes(leaf.dtype) for leaf in some) for part, some in leaves.items()
    }
    total = sum(counts.values())
    for part, count in counts.items():
        lines.append(f"{part:12s} {count:>16,}  {count / total:6.1%}  {sizes[part] / 1e9:7.2f} GB")
    kind = f"{model.param_dtype}{f', {model.llama.quantised} in the blocks of llama' if model.llama.quantised else ''}"
    lines.append(
        f"{'total':12s} {total:>16,}  {total / 1e9:.3f} B parameters, {sum(sizes.values()) / 1e9:.2f} GB in {kind}; "
        f"{model.dtype} compute"
    )
    flops = forward_flops(model, images=1, rows=1, row_tokens=model.llama.context)
    lines.append(
        "forward      "
        + ", ".join(f"{part} {value / 1e9:,.2f}" for part, value in flops.items() if value)
        + f" GFLOP for one image and one row of {model.llama.context} tokens"
    )
    return "\n".join(lines)
