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
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from emu_jax.convert.emu_keys import (
    FREQUENCIES,
    LORA,
    PREFIXES,
    TRANSFORMS,
    WITNESSES,
    Rule,
    count_layers,
    expand,
    unused,
)
from emu_jax.convert.matching import Fault, flatten, nest, report
from emu_jax.convert.torch_files import TensorFile
from emu_jax.errors import UserError
from emu_jax.models import emu

LAYOUT = "the published Emu's layout"

# The published model's values of what shapes do not tell.
VISION_HEAD_DIM = 88
LLAMA_HEAD_DIM = 128
LORA_ALPHA = 16.0

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def table(config: emu.EmuConfig | Mapping[str, Any]) -> list[Rule]:
    """Every key that a published model of these sizes has and uses, with its place in our tree."""
    config = _as_config(config)
    return expand(
        {
            "vision": config.vision.layers,
            "causal": config.causal.layers,
            "llama": config.llama.layers,
        }
    )


def _as_config(config: emu.EmuConfig | Mapping[str, Any]) -> emu.EmuConfig:
    return config if isinstance(config, emu.EmuConfig) else emu.EmuConfig.from_dict(config)


def published_shapes(config: emu.EmuConfig | Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Published key -> shape, for every used key of a model of these sizes; allocates nothing."""
    config = _as_config(config)
    targets = flatten(emu.abstract(config))
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
    if faults:
        raise UserError(report("shapes", faults, LAYOUT))
    return config


def _infer(
    shapes: Mapping[str, tuple[int, ...]], vision_head_dim: int, llama_head_dim: int
) -> tuple[dict[str, Any], list[Fault]]:
    """The config, with 2 in place of every size that cannot be read, and what could not be read."""
    depths = count_layers(shapes)
    faults: list[Fault] = []

    def votes(witnesses: tuple[tuple[str, int], ...]) -> list[int]:
        layers = range(max(depths.values()))
        # Once a tensor: a key without {layer} is the same for every layer.
        keys = dict.fromkeys((key.format(layer=i), axis) for key, axis in witnesses for i in layers)
        seen = [shapes[key][axis] for key, axis in keys if len(shapes.get(key, ())) > axis]
        return [size for size in seen if size > 0]

    def heads(of: str, head_dim: int, source: str, advice: str) -> int:
        if of not in read:
            return 1
        if head_dim > 0 and read[of] % head_dim == 0:
            return read[of] // head_dim
        faults.append(Fault("indivisible", source, f"{head_dim} does not divide the {of} {read[of]}; {advice}"))
        return 1

    read: dict[str, int] = {}
    for size, witnesses in WITNESSES.items():
        if seen := votes(witnesses):
            read[size] = Counter(seen).most_common(1)[0][0]
        else:
            keys = " or ".join(key for key, _ in witnesses)
            faults.append(Fault("unknown size", size, f"read off the shape of {keys}"))

    told = votes((FREQUENCIES,))
    advice = "it is the width of an attention head: pass the model's own"
    vision_heads = heads("vision width", vision_head_dim, "vision_head_dim", advice)
    if told:
        length = Counter(told).most_common(1)[0][0]
        llama_heads = heads("llama width", 2 * length, "rotary_emb.inv_freq", "a head is twice as wide as it is long")
    else:
        llama_heads = heads("llama width", llama_head_dim, "llama_head_dim", advice)
    sizes = dict.fromkeys(WITNESSES, 2) | read
    causal_head_dim = sizes["causal inner width"] // sizes["causal heads"]
    if causal_head_dim * sizes["causal heads"] != sizes["causal inner width"]:
        detail = f"{sizes['causal heads']} does not divide the inner width {sizes['causal inner width']}"
        faults.append(Fault("indivisible", "causal heads, one a column of relative_attention_bias", detail))
    config = {
        "vision": {
            "image_size": max(math.isqrt(sizes["positions"] - 1), 1) * sizes["patch size"],
            "patch_size": sizes["patch size"],
            "width": sizes["vision width"],
            "layers": depths["vision"],
            "heads": vision_heads,
            "mlp_dim": sizes["vision mlp_dim"],
            "norm_eps": 1e-6,
            "drop_path": 0.0,
        },
        "causal": {
            "queries": sizes["queries"],
            "width": sizes["causal width"],
            "layers": depths["causal"],
            "heads": sizes["causal heads"],
            "head_dim": causal_head_dim,
            "mlp_dim": sizes["causal mlp_dim"],
            "buckets": sizes["causal buckets"],
            "max_distance": 128,
            "norm_eps": 1e-6,
            "dropout": 0.1,
        },
        "llama": {
            "vocab_size": sizes["vocabulary"],
            "width": sizes["llama width"],
            "layers": depths["llama"],
            "heads": llama_heads,
            "mlp_dim": sizes["llama mlp_dim"],
            "norm_eps": 1e-6,
            "rope_base": 10000.0,
            "context": 2048,
        },
        "standardise": False,
        "pixel_mean": list(emu.CLIP_MEAN),
        "pixel_std": list(emu.CLIP_STD),
    }
    return config, faults


# ------------------------------------------------------------------------------------------- every key, once


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

    depths = count_layers(plain)
    rules = expand(depths)
    used, ignored = {rule.key: rule for rule in rules}, unused(depths)
    found += [Fault("missing", key, f"for {used[key].path}") for key in used if key not in plain]
    found += [Fault("unknown", name) for key, name in names.items() if key not in used and key not in ignored]

    config, unfit = _infer(plain, vision_head_dim, llama_head_dim)
    found += unfit
    try:
        targets = {path: leaf.shape for path, leaf in flatten(emu.abstract(_as_config(config))).items()}
    except UserError as error:  # sizes that no model can have
        raise UserError(report(where, [*found, Fault("impossible", str(error))], LAYOUT)) from error
    found += _unassigned(rules, targets)
    for rule in rules:
        if rule.key in plain and rule.path in targets:
            expected = _published_shape(rule, targets[rule.path])
            if plain[rule.key] != expected:
                detail = f"{plain[rule.key]}, expected {expected} for {rule.path}"
                found.append(Fault("misshapen", names[rule.key], detail))
    adapters, unfit = _adapters(halves, shapes, plain, used)
    found += unfit
    if found:
        raise UserError(report(where, found, LAYOUT))
    leftover = tuple(name for key, name in names.items() if key in ignored)
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
        if lora := LORA.fullmatch(key):
            taken, place = halves.setdefault(f"{lora['weight']}.weight", {}), lora["side"]
        if place in taken:
            faults.append(Fault("repeated", name, f"the same tensor as {taken[place]}"))
        else:
            taken[place] = name
    return names, halves, faults


def _unassigned(rules: list[Rule], targets: Mapping[str, tuple[int, ...]]) -> list[Fault]:
    """Parameters, or layers of them, that the table does not assign exactly once."""
    assigned = Counter((rule.path, rule.layer) for rule in rules)
    stacked = {rule.path for rule in rules if rule.layer is not None}
    wanted = {
        (path, layer) for path, shape in targets.items() for layer in (range(shape[0]) if path in stacked else (None,))
    }
    return [
        Fault("not assigned once", path, f"layer {layer}: {assigned[path, layer]} times")
        for path, layer in sorted(wanted | set(assigned), key=str)
        if assigned[path, layer] != ((path, layer) in wanted)
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
    targets = flatten(emu.abstract(emu.EmuConfig.from_dict(matched.config)))
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
    return matched.config, nest(flat), source


def to_published(params: emu.Params, config: emu.EmuConfig | Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """Our parameters -> (published key, contiguous array) in the parameters' dtype, one at a time; inverts `load`.

    Raises:
      UserError: the parameters are not those of this config; lists every path. Raised before the first key.
    """
    targets = {path: leaf.shape for path, leaf in flatten(emu.abstract(_as_config(config))).items()}
    flat, rules = flatten(params), table(config)
    faults = [Fault("missing", path) for path in targets if path not in flat]
    faults += [Fault("unknown", path) for path in flat if path not in targets]
    faults += [
        Fault("misshapen", path, f"{tuple(flat[path].shape)}, expected {shape}")
        for path, shape in targets.items()
        if path in flat and tuple(flat[path].shape) != shape
    ]
    faults += _unassigned(rules, targets)
    if faults:
        raise UserError(report("parameters", faults, LAYOUT))

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for rule in rules:
            leaf = flat[rule.path]
            value = np.asarray(leaf if rule.layer is None else leaf[rule.layer])
            # Contiguous: savers of tensors write the memory as it lies.
            yield rule.key, np.ascontiguousarray(TRANSFORMS[rule.transform].inverse(value))

    return tensors()
