"""The published Emu checkpoint's keys as data: each key's path in our parameter tree, and the sizes that shapes show.

`convert/emu.py` reads files by these tables. `{layer}` stands for a layer's number.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping

import numpy as np


@dataclasses.dataclass(frozen=True)
class Transform:
    """Turns a published tensor into (a layer of) our parameter, and back. Both directions only move elements."""

    forward: Callable[[np.ndarray], np.ndarray]
    inverse: Callable[[np.ndarray], np.ndarray]


def _patches_to_conv(x: np.ndarray) -> np.ndarray:
    """[p*p*3, D], rows in (ph, pw, c) order -> [D, 3, p, p]."""
    side = math.isqrt(x.shape[0] // 3)
    return x.reshape(side, side, 3, x.shape[1]).transpose(3, 2, 0, 1)


TRANSFORMS: dict[str, Transform] = {
    "identity": Transform(lambda x: x, lambda x: x),
    # PyTorch's Linear keeps [out, in], our kernels are [in, out].
    "transpose": Transform(lambda x: x.T, lambda x: x.T),
    # [1, n, D] <-> [n, D]
    "squeeze": Transform(lambda x: x[0], lambda x: x[None]),
    # A convolution whose stride is its size [D, 3, p, p] <-> a matrix over flattened patches [p*p*3, D].
    "patches": Transform(lambda x: x.transpose(2, 3, 1, 0).reshape(-1, x.shape[0]), _patches_to_conv),
}

# (published key, our path, transform). With {layer} in the key, the path names a stack of layers.
TABLE: tuple[tuple[str, str, str], ...] = (
    ("visual.cls_token", "vision/cls_token", "squeeze"),
    ("visual.pos_embed", "vision/pos_embed", "squeeze"),
    ("visual.patch_embed.proj.weight", "vision/patch_embed/kernel", "patches"),
    ("visual.patch_embed.proj.bias", "vision/patch_embed/bias", "identity"),
    ("visual.blocks.{layer}.norm1.weight", "vision/blocks/norm1/scale", "identity"),
    ("visual.blocks.{layer}.norm1.bias", "vision/blocks/norm1/bias", "identity"),
    ("visual.blocks.{layer}.attn.qkv.weight", "vision/blocks/attn/qkv/kernel", "transpose"),
    ("visual.blocks.{layer}.attn.q_bias", "vision/blocks/attn/q_bias", "identity"),
    ("visual.blocks.{layer}.attn.v_bias", "vision/blocks/attn/v_bias", "identity"),
    ("visual.blocks.{layer}.attn.proj.weight", "vision/blocks/attn/proj/kernel", "transpose"),
    ("visual.blocks.{layer}.attn.proj.bias", "vision/blocks/attn/proj/bias", "identity"),
    ("visual.blocks.{layer}.norm2.weight", "vision/blocks/norm2/scale", "identity"),
    ("visual.blocks.{layer}.norm2.bias", "vision/blocks/norm2/bias", "identity"),
    ("visual.blocks.{layer}.mlp.fc1.weight", "vision/blocks/mlp/fc1/kernel", "transpose"),
    ("visual.blocks.{layer}.mlp.fc1.bias", "vision/blocks/mlp/fc1/bias", "identity"),
    ("visual.blocks.{layer}.mlp.fc2.weight", "vision/blocks/mlp/fc2/kernel", "transpose"),
    ("visual.blocks.{layer}.mlp.fc2.bias", "vision/blocks/mlp/fc2/bias", "identity"),
    ("ln_visual.weight", "ln_visual/scale", "identity"),
    ("ln_visual.bias", "ln_visual/bias", "identity"),
    ("cformer.causal_tokens", "causal/queries", "squeeze"),
    # Only block 0 has the table of relative positions; every block's self-attention adds it.
    (
        "cformer.cformer.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        "causal/relative_bias",
        "identity",
    ),
    *(
        (f"cformer.cformer.block.{{layer}}.{key}.weight", f"causal/blocks/{path}", transform)
        for key, path, transform in (
            ("layer.0.layer_norm", "self_norm/scale", "identity"),
            ("layer.0.SelfAttention.q", "self_attn/q/kernel", "transpose"),
            ("layer.0.SelfAttention.k", "self_attn/k/kernel", "transpose"),
            ("layer.0.SelfAttention.v", "self_attn/v/kernel", "transpose"),
            ("layer.0.SelfAttention.o", "self_attn/o/kernel", "transpose"),
            ("layer.1.layer_norm", "cross_norm/scale", "identity"),
            ("layer.1.EncDecAttention.q", "cross_attn/q/kernel", "transpose"),
            ("layer.1.EncDecAttention.k", "cross_attn/k/kernel", "transpose"),
            ("layer.1.EncDecAttention.v", "cross_attn/v/kernel", "transpose"),
            ("layer.1.EncDecAttention.o", "cross_attn/o/kernel", "transpose"),
            ("layer.2.layer_norm", "mlp_norm/scale", "identity"),
            ("layer.2.DenseReluDense.wi", "mlp/wi/kernel", "transpose"),
            ("layer.2.DenseReluDense.wo", "mlp/wo/kernel", "transpose"),
        )
    ),
    ("cformer.cformer.final_layer_norm.weight", "causal/final_norm/scale", "identity"),
    ("cformer.projection.weight", "causal/projection/kernel", "transpose"),
    ("cformer.projection.bias", "causal/projection/bias", "identity"),
    ("decoder.lm.model.embed_tokens.weight", "llama/embed/embedding", "identity"),
    *(
        (f"decoder.lm.model.layers.{{layer}}.{key}.weight", f"llama/blocks/{path}", transform)
        for key, path, transform in (
            ("input_layernorm", "attn_norm/scale", "identity"),
            ("self_attn.q_proj", "attn/q/kernel", "transpose"),
            ("self_attn.k_proj", "attn/k/kernel", "transpose"),
            ("self_attn.v_proj", "attn/v/kernel", "transpose"),
            ("self_attn.o_proj", "attn/o/kernel", "transpose"),
            ("post_attention_layernorm", "mlp_norm/scale", "identity"),
            ("mlp.gate_proj", "mlp/gate/kernel", "transpose"),
            ("mlp.up_proj", "mlp/up/kernel", "transpose"),
            ("mlp.down_proj", "mlp/down/kernel", "transpose"),
        )
    ),
    ("decoder.lm.model.norm.weight", "llama/final_norm/scale", "identity"),
    ("decoder.lm.lm_head.weight", "llama/lm_head/kernel", "transpose"),
    ("decoder.lm.stu_regress_head.weight", "llama/visual_head/kernel", "transpose"),
)

# (published key, the part whose layers {layer} counts): the model does not use it, and it may be absent.
UNUSED: tuple[tuple[str, str], ...] = (
    ("visual.norm.weight", "vision"),  # EVA-CLIP's final norm and head: Emu takes the features before them
    ("visual.norm.bias", "vision"),
    ("visual.head.weight", "vision"),
    ("visual.head.bias", "vision"),
    ("cformer.cformer.embed_tokens.weight", "causal"),  # T5's vocabulary: the queries take its place
    # RoPE's frequencies are computed; only their number is used, because it shows the head width.
    ("decoder.lm.model.layers.{layer}.self_attn.rotary_emb.inv_freq", "llama"),
)

# File's prefix -> published prefix: PEFT wraps Emu-I's LLM, and some tools flatten the top-level `module`.
PREFIXES: tuple[tuple[str, str], ...] = (
    ("module.", ""),
    ("decoder.lm.base_model.model.", "decoder.lm."),
)
# PEFT's adapters have a name in a model's state ("default"), and none in a file of adapters; the weight below one is
# `….base_layer.weight` since PEFT 0.6.
LORA = re.compile(r"(?P<weight>.+)\.lora_(?P<side>[AB])(?:\.(?P<adapter>[^.]+))?\.weight")
BASE_LAYER = ".base_layer.weight"


@dataclasses.dataclass(frozen=True)
class Rule:
    """Assigns one published tensor to `path` in our tree, at `layer` of its leading axis (None: all of it)."""

    key: str
    path: str
    layer: int | None
    transform: str


# size -> the (published key, axis) pairs that show it. The majority wins, so that one misshapen tensor is reported as
# such, and not as a fault of all the others.
WITNESSES: dict[str, tuple[tuple[str, int], ...]] = {
    "patch size": (("visual.patch_embed.proj.weight", 2),),
    "positions": (("visual.pos_embed", 1),),
    "vision width": (
        ("visual.patch_embed.proj.bias", 0),
        ("visual.blocks.{layer}.norm1.weight", 0),
        ("visual.blocks.{layer}.norm2.weight", 0),
    ),
    "vision mlp_dim": (
        ("visual.blocks.{layer}.mlp.fc1.bias", 0),
        ("visual.blocks.{layer}.mlp.fc1.weight", 0),
        ("visual.blocks.{layer}.mlp.fc2.weight", 1),
    ),
    "queries": (("cformer.causal_tokens", 1),),
    "causal width": (
        ("cformer.cformer.final_layer_norm.weight", 0),
        ("cformer.cformer.block.{layer}.layer.0.layer_norm.weight", 0),
        ("cformer.cformer.block.{layer}.layer.1.layer_norm.weight", 0),
    ),
    "causal inner width": (
        ("cformer.cformer.block.{layer}.layer.0.SelfAttention.q.weight", 0),
        ("cformer.cformer.block.{layer}.layer.0.SelfAttention.k.weight", 0),
        ("cformer.cformer.block.{layer}.layer.1.EncDecAttention.q.weight", 0),
    ),
    "causal mlp_dim": (
        ("cformer.cformer.block.{layer}.layer.2.DenseReluDense.wi.weight", 0),
        ("cformer.cformer.block.{layer}.layer.2.DenseReluDense.wo.weight", 1),
    ),
    "causal buckets": (("cformer.cformer.block.0.layer.0.SelfAttention.relative_attention_bias.weight", 0),),
    "causal heads": (("cformer.cformer.block.0.layer.0.SelfAttention.relative_attention_bias.weight", 1),),
    "vocabulary": (("decoder.lm.model.embed_tokens.weight", 0), ("decoder.lm.lm_head.weight", 0)),
    "llama width": (
        ("decoder.lm.model.norm.weight", 0),
        ("decoder.lm.model.layers.{layer}.input_layernorm.weight", 0),
        ("decoder.lm.model.layers.{layer}.post_attention_layernorm.weight", 0),
    ),
    "llama key width": (
        ("decoder.lm.model.layers.{layer}.self_attn.k_proj.weight", 0),
        ("decoder.lm.model.layers.{layer}.self_attn.v_proj.weight", 0),
    ),
    "llama mlp_dim": (
        ("decoder.lm.model.layers.{layer}.mlp.gate_proj.weight", 0),
        ("decoder.lm.model.layers.{layer}.mlp.up_proj.weight", 0),
        ("decoder.lm.model.layers.{layer}.mlp.down_proj.weight", 1),
    ),
}
FREQUENCIES = ("decoder.lm.model.layers.{layer}.self_attn.rotary_emb.inv_freq", 0)


def expand(depths: Mapping[str, int]) -> list[Rule]:
    """The table as one rule per tensor, for parts with these numbers of layers."""
    rules = []
    for key, path, transform in TABLE:
        if "{layer}" not in key:
            rules.append(Rule(key, path, None, transform))
            continue
        depth = depths[path.partition("/")[0]]
        rules += [Rule(key.format(layer=i), path, i, transform) for i in range(depth)]
    return rules


def unused(depths: Mapping[str, int]) -> set[str]:
    """The published keys that may be present and are not used, for parts with these numbers of layers."""
    return {key.format(layer=i) for key, part in UNUSED for i in range(depths[part])}


def count_layers(keys: Iterable[str]) -> dict[str, int]:
    """The number of layers of every part, at least 1, from the numbers in the keys that the table knows.

    It is one more than the highest number below which at least half of the layers are present. So a lost layer is
    reported as missing, and one absurd number as an unknown key, not as a million missing layers.
    """
    numbers: dict[str, set[int]] = {"vision": {0}, "causal": {0}, "llama": {0}}
    for pattern, path, _ in TABLE:
        before, found, after = pattern.partition("{layer}")
        if found:
            known = re.compile(f"{re.escape(before)}(0|[1-9][0-9]{{0,8}}){re.escape(after)}")
            part = numbers[path.partition("/")[0]]
            part.update(int(match[1]) for key in keys if (match := known.fullmatch(key)))
    return {
        part: max(number + 1 for rank, number in enumerate(sorted(found), start=1) if 2 * rank > number)
        for part, found in numbers.items()
    }
