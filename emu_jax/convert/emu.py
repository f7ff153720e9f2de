"""The published Emu checkpoint <-> our parameters: one table, checked in both directions.

In: `pretrain/multimodal_encoder/pytorch_model.bin`, `Emu-instruct.pt` (its LoRA is merged) or the same keys in a
`.safetensors` file. Out: `config.model` as a plain dict, read off the shapes, and the nested dict of parameters
as NumPy arrays. Every key is used exactly once or stands on the list of unused ones, every parameter is assigned
exactly once; whatever is missing, unknown, misshapen or repeated is reported at once, and nothing is returned.

Three names for one tensor: the *file's* key (`decoder.lm.base_model.model.lm_head.weight` in Emu-I), the
*published* key that the table speaks of (`decoder.lm.lm_head.weight`), and our path (`llama/lm_head/kernel`).
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from emu_jax.convert.torch_files import TensorFile
from emu_jax.errors import UserError
from emu_jax.models import emu

# The published model's values of what shapes do not tell.
VISION_HEAD_DIM = 88
LLAMA_HEAD_DIM = 128
LORA_ALPHA = 16.0

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}

# ------------------------------------------------------------------------------------------------ the table


@dataclasses.dataclass(frozen=True)
class Transform:
    """How a published tensor becomes (a layer of) our parameter, and back. Both only move elements."""

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
    # Block 0 alone has the table of relative positions; every block's self-attention adds it.
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
    ("decoder.lm.stu_regress_head.weight", "llama/regress_head/kernel", "transpose"),
)

# (published key, the part whose depth {layer} counts): in the file, read by nothing, and no fault when absent.
UNUSED: tuple[tuple[str, str], ...] = (
    ("visual.norm.weight", "vision"),  # EVA-CLIP's final norm and head: Emu takes the features before them
    ("visual.norm.bias", "vision"),
    ("visual.head.weight", "vision"),
    ("visual.head.bias", "vision"),
    ("cformer.cformer.embed_tokens.weight", "causal"),  # T5's vocabulary: the queries take its place
    # RoPE's frequencies are computed; their number alone is used, for it tells the LLM's head width.
    ("decoder.lm.model.layers.{layer}.self_attn.rotary_emb.inv_freq", "llama"),
)

# File's prefix -> published prefix: PEFT wraps Emu-I's LLM, and some tools flatten the top-level `module`.
PREFIXES: tuple[tuple[str, str], ...] = (
    ("module.", ""),
    ("decoder.lm.base_model.model.", "decoder.lm."),
)
_LORA = re.compile(r"(?P<weight>.+)\.lora_(?P<side>[AB])\.default\.weight")


@dataclasses.dataclass(frozen=True)
class Rule:
    """One published tensor's place: `path` in our tree, at `layer` of its leading axis (None: all of it)."""

    key: str
    path: str
    layer: int | None
    transform: str


def table(config: emu.EmuConfig | Mapping[str, Any]) -> list[Rule]:
    """Every key that a published model of these sizes has and uses, with its place in our tree."""
    config = _as_config(config)
    return _expand(
        {
            "vision": config.vision.layers,
            "causal": config.causal.layers,
            "llama": config.llama.layers,
        }
    )


def _expand(depths: Mapping[str, int]) -> list[Rule]:
    rules = []
    for key, path, transform in TABLE:
        if "{layer}" not in key:
            rules.append(Rule(key, path, None, transform))
            continue
        depth = depths[path.partition("/")[0]]
        rules += [Rule(key.format(layer=i), path, i, transform) for i in range(depth)]
    return rules


def _unused(depths: Mapping[str, int]) -> set[str]:
    return {key.format(layer=i) for key, part in UNUSED for i in range(max(depths[part], 1))}


def _as_config(config: emu.EmuConfig | Mapping[str, Any]) -> emu.EmuConfig:
    return config if isinstance(config, emu.EmuConfig) else emu.EmuConfig.from_dict(config)


def published_shapes(config: emu.EmuConfig | Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Published key -> shape, for every used key of a model of these sizes; allocates nothing."""
    config = _as_config(config)
    targets = _flatten(emu.abstract(config))
    return {rule.key: _published_shape(rule, targets[rule.path].shape) for rule in table(config)}


def _published_shape(rule: Rule, ours: tuple[int, ...]) -> tuple[int, ...]:
    """What a tensor must look like in the file to become `ours` (with the layers' axis, if it has one)."""
    # One zero, seen at every index: the transforms run on it without memory of its size.
    stand_in = np.broadcast_to(np.float32(0), ours if rule.layer is None else ours[1:])
    return TRANSFORMS[rule.transform].inverse(stand_in).shape


# ----------------------------------------------------------------------------------------- sizes from shapes


def infer_config(
    shapes: Mapping[str, tuple[int, ...]],
    *,
    vision_head_dim: int = VISION_HEAD_DIM,
    llama_head_dim: int = LLAMA_HEAD_DIM,
) -> dict[str, Any]:
    """`config.model` from published keys and shapes.

    Args:
      shapes: published key -> shape (`decoder.lm.model…`, without prefixes).
      vision_head_dim: shapes do not tell it; the default is the published model's.
      llama_head_dim: used only where the file has no `rotary_emb.inv_freq`, which tells it.

    Raises:
      UserError: sizes cannot be read off, or do not divide; lists every reason.
    """
    config, faults = _infer(shapes, vision_head_dim, llama_head_dim)
    if config is None:
        raise UserError(_report("these shapes", faults))
    return config


def _depths(keys: Mapping[str, Any]) -> dict[str, int]:
    """Layers of every part: one more than the highest number in a key that the table knows."""
    depths = dict.fromkeys(("vision", "causal", "llama"), 0)
    for pattern, path, _ in TABLE:
        before, found, after = pattern.partition("{layer}")
        if not found:
            continue
        part = path.partition("/")[0]
        known = re.compile(f"{re.escape(before)}(0|[1-9][0-9]*){re.escape(after)}")
        numbers = (int(match[1]) + 1 for key in keys if (match := known.fullmatch(key)))
        depths[part] = max(depths[part], *numbers, 0)
    # A file holds no more layers than keys: one absurd number must not make a list of absurd length.
    return {part: min(depth, len(keys)) for part, depth in depths.items()}


def _infer(
    shapes: Mapping[str, tuple[int, ...]], vision_head_dim: int, llama_head_dim: int
) -> tuple[dict[str, Any] | None, list[Fault]]:
    faults: list[Fault] = []

    def read(key: str, rank: int) -> tuple[int, ...]:
        """The shape of a tensor that tells sizes; ones in its place when it cannot be read."""
        if key not in shapes:
            faults.append(Fault("missing", key, "tells the model's sizes"))
        elif len(shapes[key]) != rank or min(shapes[key]) < 1:
            found = tuple(shapes[key])
            faults.append(Fault("misshapen", key, f"{found}, expected {rank} axes of at least 1"))
        else:
            return tuple(shapes[key])
        return (1,) * rank

    def divide(width: int, by: int, name: str, advice: str) -> int:
        if by < 1 or width % by:
            faults.append(Fault("indivisible", name, f"{by} does not divide {width}; {advice}"))
            return 1
        return width // by

    block = "cformer.cformer.block.0.layer"
    vision_width, _, patch, _ = read("visual.patch_embed.proj.weight", 4)
    _, positions, _ = read("visual.pos_embed", 3)
    vision_mlp, _ = read("visual.blocks.0.mlp.fc1.weight", 2)
    _, queries, causal_width = read("cformer.causal_tokens", 3)
    buckets, causal_heads = read(f"{block}.0.SelfAttention.relative_attention_bias.weight", 2)
    causal_inner, _ = read(f"{block}.0.SelfAttention.q.weight", 2)
    causal_mlp, _ = read(f"{block}.2.DenseReluDense.wi.weight", 2)
    vocabulary, llama_width = read("decoder.lm.model.embed_tokens.weight", 2)
    llama_mlp, _ = read("decoder.lm.model.layers.0.mlp.gate_proj.weight", 2)
    frequencies = "decoder.lm.model.layers.0.self_attn.rotary_emb.inv_freq"
    llama_source, llama_advice = "llama_head_dim", "pass the width of the LLM's heads"
    if frequencies in shapes:
        llama_head_dim = 2 * read(frequencies, 1)[0]
        llama_source, llama_advice = frequencies, "twice its length is the LLM's head width"
    # Of sizes that could not be read nothing follows: report those alone.
    readable = not faults

    vision_heads = causal_head_dim = llama_heads = 1
    if readable:
        advice = "pass the width of the vision encoder's heads, which shapes do not tell"
        vision_heads = divide(vision_width, vision_head_dim, "vision_head_dim", advice)
        bias = f"{block}.0.SelfAttention.relative_attention_bias.weight"
        causal_head_dim = divide(causal_inner, causal_heads, bias, "it has one column a head")
        llama_heads = divide(llama_width, llama_head_dim, llama_source, llama_advice)
    if faults:
        return None, faults
    depths = _depths(shapes)
    config = {
        "vision": {
            "image_size": math.isqrt(positions - 1) * patch,
            "patch_size": patch,
            "width": vision_width,
            "layers": depths["vision"],
            "heads": vision_heads,
            "mlp_dim": vision_mlp,
            "norm_eps": 1e-6,
            "drop_path": 0.0,
        },
        "causal": {
            "queries": queries,
            "width": causal_width,
            "layers": depths["causal"],
            "heads": causal_heads,
            "head_dim": causal_head_dim,
            "mlp_dim": causal_mlp,
            "buckets": buckets,
            "max_distance": 128,
            "norm_eps": 1e-6,
            "dropout": 0.1,
        },
        "llama": {
            "vocab_size": vocabulary,
            "width": llama_width,
            "layers": depths["llama"],
            "heads": llama_heads,
            "mlp_dim": llama_mlp,
            "norm_eps": 1e-6,
            "rope_base": 10000.0,
            "context": 2048,
        },
        "standardise": False,
        "pixel_mean": list(emu.CLIP_MEAN),
        "pixel_std": list(emu.CLIP_STD),
    }
    return config, []


# ------------------------------------------------------------------------------------------- every key, once


@dataclasses.dataclass(frozen=True)
class Fault:
    """One thing that does not fit: `kind` (missing, unknown, …), the key or path, what is wrong with it."""

    kind: str
    name: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.kind}: {self.name}" + (f" ({self.detail})" if self.detail else "")


def _report(where: str, faults: list[Fault]) -> str:
    """A summary in the first line, then every fault in a line of its own."""
    faults = list(dict.fromkeys(faults))
    counts = ", ".join(f"{count} {kind}" for kind, count in Counter(f.kind for f in faults).items())
    lines = [f"{where}: not the weights of an Emu: {counts}; nothing was loaded, expected every key once:"]
    return "\n  ".join([*lines, *map(str, faults)])


@dataclasses.dataclass(frozen=True)
class Match:
    """A checkpoint's keys, told apart. All names in the values are the file's.

    Attributes:
      config: `config.model`, as a plain dict.
      rules: what to assign, in the table's order.
      names: published key -> file's key, for every rule.
      adapters: published key of an adapted weight -> (file's key of lora_A [r, in], of lora_B [out, r]).
      unused: the file's keys that nothing reads, by the list.
    """

    config: dict[str, Any]
    rules: list[Rule]
    names: dict[str, str]
    adapters: dict[str, tuple[str, str]]
    unused: tuple[str, ...]


def match(
    shapes: Mapping[str, tuple[int, ...]],
    *,
    where: str = "checkpoint",
    vision_head_dim: int = VISION_HEAD_DIM,
    llama_head_dim: int = LLAMA_HEAD_DIM,
    faults: tuple[Fault, ...] = (),
) -> Match:
    """Assigns every key of a file, given its shapes alone.

    Args:
      shapes: the file's key -> shape.
      where: the file, for errors.
      vision_head_dim, llama_head_dim: as in `infer_config`.
      faults: found before, to be reported with those found here.

    Raises:
      UserError: any key is missing, unknown, misshapen or repeated, or any parameter is not assigned exactly
        once; its first line is a summary, and a line follows for every fault.
    """
    found = list(faults)
    names, halves, repeated = _published_names(shapes)
    found += repeated
    plain = {key: tuple(shapes[name]) for key, name in names.items()}

    depths = _depths(plain)
    rules = _expand(depths)
    used, unused = {rule.key: rule for rule in rules}, _unused(depths)
    found += [Fault("missing", key, f"for {used[key].path}") for key in used if key not in plain]
    found += [Fault("unknown", name) for key, name in names.items() if key not in used and key not in unused]

    config, unreadable = _infer(plain, vision_head_dim, llama_head_dim)
    already = {(fault.kind, fault.name) for fault in found}
    for fault in unreadable:
        fault = dataclasses.replace(fault, name=names.get(fault.name, fault.name))
        if (fault.kind, fault.name) not in already:
            found.append(fault)
    if config is not None:
        targets = _flatten(emu.abstract(emu.EmuConfig.from_dict(config)))
        found += _unassigned(rules, {path: leaf.shape for path, leaf in targets.items()})
        for rule in rules:
            if rule.key in plain and rule.path in targets:
                expected = _published_shape(rule, targets[rule.path].shape)
                if plain[rule.key] != expected:
                    detail = f"{plain[rule.key]}, expected {expected} for {rule.path}"
                    found.append(Fault("misshapen", names[rule.key], detail))
    adapters, unfit = _adapters(halves, shapes, plain, used)
    found += unfit
    if found:
        raise UserError(_report(where, found))
    leftover = tuple(name for key, name in names.items() if key in unused)
    return Match(config, rules, {key: names[key] for key in used}, adapters, leftover)


def _published_names(
    keys: Mapping[str, Any],
) -> tuple[dict[str, str], dict[str, dict[str, str]], list[Fault]]:
    """The file's keys as published key -> file's key; LoRA's apart, as adapted weight -> {"A" | "B": file's key}."""
    names: dict[str, str] = {}
    halves: dict[str, dict[str, str]] = {}
    faults = []
    for name in keys:
        key = name
        for before, after in PREFIXES:
            if key.startswith(before):
                key = after + key.removeprefix(before)
        taken, place = names, key
        if lora := _LORA.fullmatch(key):
            taken, place = halves.setdefault(f"{lora['weight']}.weight", {}), lora["side"]
        if place in taken:
            faults.append(Fault("repeated", name, f"the same tensor as {taken[place]}"))
        else:
            taken[place] = name
    return names, halves, faults


def _unassigned(rules: list[Rule], targets: Mapping[str, tuple[int, ...]]) -> list[Fault]:
    """Parameters (or layers of one) that the table does not assign exactly once."""
    assigned = Counter((rule.path, rule.layer) for rule in rules)
    wanted: set[tuple[str, int | None]] = set()
    for path, shape in targets.items():
        whole = (path, None) in assigned or not any(rule.path == path for rule in rules)
        wanted |= {(path, None)} if whole else {(path, layer) for layer in range(shape[0])}
    return [
        Fault("assigned otherwise than once", path, f"layer {layer}, {assigned[path, layer]} times")
        for path, layer in sorted(wanted | set(assigned), key=str)
        if assigned[path, layer] != 1 or (path, layer) not in wanted
    ]


def _adapters(
    halves: Mapping[str, Mapping[str, str]],
    shapes: Mapping[str, tuple[int, ...]],
    plain: Mapping[str, tuple[int, ...]],
    used: Mapping[str, Rule],
) -> tuple[dict[str, tuple[str, str]], list[Fault]]:
    """Complete pairs that fit their weight [out, in]: A [r, in] and B [out, r]; and the faults of the others."""
    adapters, faults = {}, []
    for key, pair in halves.items():
        if key not in used or used[key].transform != "transpose":
            faults += [Fault("unknown", name, f"{key} is no matrix to adapt") for name in pair.values()]
            continue
        if missing := {"A", "B"} - set(pair):
            (present,) = pair.values()
            faults.append(Fault("missing", f"lora_{missing.pop()} of {key}", f"the pair of {present}"))
            continue
        a, b = pair["A"], pair["B"]
        fits = len(shapes[a]) == len(shapes[b]) == 2 and shapes[a][0] == shapes[b][1] > 0
        if fits and key in plain:
            fits = (shapes[b][0], shapes[a][1]) == plain[key]
        if fits:
            adapters[key] = (a, b)
        else:
            detail = (
                f"{tuple(shapes[a])}, with lora_B {tuple(shapes[b])}; expected (r, in) and (out, r) of "
                f"{plain.get(key, 'its weight')}"
            )
            faults.append(Fault("misshapen", a, detail))
    return adapters, faults


# ------------------------------------------------------------------------------------------------ both ways


@dataclasses.dataclass(frozen=True)
class Source:
    """Where loaded parameters come from.

    Attributes:
      file: the file that was read.
      unused: its keys that the model has no use for.
      beside: what lay beside the weights in the file (a trainer's state) and was not looked at.
      adapters: published keys of the weights into which LoRA was merged.
      lora_ranks: their ranks, from the shapes.
      lora_alpha: merged as W + alpha / r * B A.
    """

    file: Path
    unused: tuple[str, ...]
    beside: tuple[str, ...]
    adapters: tuple[str, ...]
    lora_ranks: tuple[int, ...]
    lora_alpha: float


def find_weights(path: str | Path) -> Path:
    """The file of multimodal weights: `path` itself, or where the published download keeps it."""
    path = Path(path)
    places = [path / folder / "multimodal_encoder" / "pytorch_model.bin" for folder in ("", "pretrain")]
    if not path.is_dir():
        return path
    for file in places:
        if file.is_file():
            return file
    other = sorted(path.glob("*.pt"))
    advice = f"; pass {other[0]} for the weights in that file" if other else ""
    raise UserError(f"{path}: holds no weights; expected multimodal_encoder/pytorch_model.bin in it{advice}")


def load(
    path: str | Path,
    *,
    vision_head_dim: int = VISION_HEAD_DIM,
    llama_head_dim: int = LLAMA_HEAD_DIM,
    lora_alpha: float = LORA_ALPHA,
    dtype: str = "float32",
) -> tuple[dict[str, Any], emu.Params, Source]:
    """Reads published weights; LoRA is merged in float32.

    Args:
      path: a folder with multimodal_encoder/pytorch_model.bin (or the one above its `pretrain`), or a `.bin`,
        `.pt` or `.safetensors` file.
      vision_head_dim, llama_head_dim: as in `infer_config`.
      lora_alpha: of the adapters, if there are any; files do not tell it.
      dtype: of the parameters, float32 or bfloat16.

    Returns:
      `config.model` as a plain dict, the nested dict of NumPy parameters, and where they came from.

    Raises:
      UserError: no such weights, not readable, or not an Emu's; lists everything that does not fit at once.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype={dtype!r} for weights; expected one of {', '.join(DTYPES)}")
    file = TensorFile(find_weights(path))
    unfit = [Fault("unknown", name, f"{kind}, no tensor") for name, kind in file.others.items()]
    unfit += [
        Fault("unreadable", name, f"{kind}, expected a floating type of 16 to 64 bits")
        for name, kind in file.dtypes.items()
        if not isinstance(kind, np.dtype)
    ]
    matched = match(
        file.shapes,
        where=str(file.path),
        vision_head_dim=vision_head_dim,
        llama_head_dim=llama_head_dim,
        faults=tuple(unfit),
    )
    targets = _flatten(emu.abstract(emu.EmuConfig.from_dict(matched.config)))
    flat = {name: np.empty(leaf.shape, DTYPES[dtype]) for name, leaf in targets.items()}
    for rule in matched.rules:
        value = file[matched.names[rule.key]]
        if rule.key in matched.adapters:
            a, b = (file[name].astype(np.float32) for name in matched.adapters[rule.key])
            value = value.astype(np.float32) + np.float32(lora_alpha / a.shape[0]) * (b @ a)
        flat[rule.path][... if rule.layer is None else rule.layer] = TRANSFORMS[rule.transform].forward(value)
    source = Source(
        file=file.path,
        unused=matched.unused,
        beside=file.beside,
        adapters=tuple(matched.adapters),
        lora_ranks=tuple(sorted({file.shapes[a][0] for a, _ in matched.adapters.values()})),
        lora_alpha=lora_alpha,
    )
    return matched.config, _nest(flat), source


def to_published(params: emu.Params, config: emu.EmuConfig | Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """Our parameters -> (published key, contiguous array) in the parameters' dtype, one at a time; inverts `load`.

    Raises:
      UserError: the parameters are not those of this config; lists every path. Raised before the first key.
    """
    targets = {path: leaf.shape for path, leaf in _flatten(emu.abstract(_as_config(config))).items()}
    flat, rules = _flatten(params), table(config)
    faults = [Fault("missing", path) for path in targets if path not in flat]
    faults += [Fault("unknown", path) for path in flat if path not in targets]
    faults += [
        Fault("misshapen", path, f"{tuple(flat[path].shape)}, expected {shape}")
        for path, shape in targets.items()
        if path in flat and tuple(flat[path].shape) != shape
    ]
    faults += _unassigned(rules, targets)
    if faults:
        raise UserError(_report("parameters", faults))

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for rule in rules:
            leaf = flat[rule.path]
            value = np.asarray(leaf if rule.layer is None else leaf[rule.layer])
            # Contiguous: savers of tensors write the memory as it lies.
            yield rule.key, np.ascontiguousarray(TRANSFORMS[rule.transform].inverse(value))

    return tensors()


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flatten(value, f"{prefix}{name}/") if isinstance(value, Mapping) else {prefix + name: value}
    return flat


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *folders, name = path.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[name] = value
    return tree
