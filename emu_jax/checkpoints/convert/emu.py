"""The published Emu checkpoint <-> our parameters: one table, checked in both directions.

In: `pretrain/multimodal_encoder/pytorch_model.bin`, `Emu-instruct.pt` or the same keys in a `.safetensors` file. Out:
a `Plan`, or the parameters as NumPy arrays; sizes are read off the shapes. Every key is used exactly once or stands on
the list of unused ones, every parameter is assigned exactly once; whatever is missing, unknown, misshapen or repeated
is reported at once, and nothing is returned. `scope` narrows the table to a part, for files that hold that alone.

Three names for one tensor: the *file's* key (`decoder.lm.base_model.model.lm_head.weight` in Emu-I), the
*published* key that the table speaks of (`decoder.lm.lm_head.weight`), and our path (`llama/lm_head/kernel`).
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from emu_jax.checkpoints.convert.emu_keys import (
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
from emu_jax.checkpoints.convert.matching import Fault, report
from emu_jax.checkpoints.convert.plan import Plan, Step, gather, source_dtypes, unreadable
from emu_jax.checkpoints.convert.tensor_files import TensorFile, Tensors
from emu_jax.errors import UserError
from emu_jax.models import emu
from emu_jax.models.layers import ADAPTER_LEAVES
from emu_jax.models.paths import flatten, join

LAYOUT = "the published Emu's layout"

# The published model's values of what shapes do not tell.
VISION_HEAD_DIM = 88
LLAMA_HEAD_DIM = 128
LORA_ALPHA = 16.0
BLOCKS = "llama/blocks/"  # what adapters can be trained beside

Scope = Callable[[str], bool]  # whether a path of ours belongs to what a file holds


def everything(path: str) -> bool:
    """The scope of a whole Emu."""
    return True


def table(config: emu.EmuConfig | Mapping[str, Any]) -> list[Rule]:
    """Every key that a published model of these sizes has and uses, with its place in our tree."""
    config = _as_config(config)
    return table_of(vision=config.vision.layers, causal=config.causal.layers, llama=config.llama.layers)


def table_of(**depths: int) -> list[Rule]:
    """The rules of models with so many layers a part; a part that is not named has none."""
    return expand(dict.fromkeys(emu.PARTS, 0) | depths)


def _as_config(config: emu.EmuConfig | Mapping[str, Any]) -> emu.EmuConfig:
    return config if isinstance(config, emu.EmuConfig) else emu.EmuConfig.from_dict(config)


def published_shapes(config: emu.EmuConfig | Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Published key -> shape, for every used key of a model of these sizes; allocates nothing."""
    config = _as_config(config)
    targets = flatten(emu.abstract(config))
    return {rule.key: published_shape(rule, targets[rule.path].shape) for rule in table(config)}


def published_shape(rule: Rule, ours: tuple[int, ...]) -> tuple[int, ...]:
    """What a tensor looks like in the file that becomes `ours` (with the layers' axis, if it has one)."""
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


PART_OF = {"patch": "vision", "positions": "vision", "queries": "causal", "vocabulary": "llama"}


def _infer(
    shapes: Mapping[str, tuple[int, ...]],
    vision_head_dim: int,
    llama_head_dim: int,
    parts: Container[str] = emu.PARTS,
) -> tuple[dict[str, Any], list[Fault]]:
    """The config, with 2 in place of every size that cannot be read, and what of `parts` could not be read."""
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
        part = size.split()[0]
        if PART_OF.get(part, part) not in parts:
            continue
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
    causal_head_dim = max(sizes["causal inner width"] // sizes["causal heads"], 1)
    if causal_head_dim * sizes["causal heads"] != sizes["causal inner width"]:
        detail = f"{sizes['causal heads']} does not divide the inner width {sizes['causal inner width']}"
        ((bias, _),) = WITNESSES["causal heads"]
        faults.append(Fault("indivisible", bias, f"{detail}; a head is a column"))
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
      config: `config.model`, as a plain dict; a part outside the scope has sizes that mean nothing.
      targets: our paths and their shapes.
      rules: what to assign, in the table's order.
      names: published key -> file's key, for every rule.
      adapters: published key of an adapted weight -> (file's key of lora_A [r, in], of lora_B [out, r]).
      unused: the file's keys that nothing reads, by the list.
    """

    config: dict[str, Any]
    targets: dict[str, tuple[int, ...]]
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
    prefix: str = "",
    scope: Scope = everything,
    layout: str = LAYOUT,
) -> Match:
    """Assigns every key of a file, given its shapes alone.

    Args:
      shapes: the file's key -> shape.
      prefix: what a file of a part leaves out of the published keys.
      scope: the paths that the file must give.
      where: the file, for errors.
      vision_head_dim, llama_head_dim: as in `infer_config`.
      faults: found before, to be reported with those found here.

    Raises:
      UserError: any key is missing, unknown, misshapen or repeated, or any parameter is not assigned exactly
        once; its first line is a summary, and a line follows for every fault.
    """
    found = list(faults)
    names, halves, repeated = _published_names(shapes, prefix)
    found += repeated
    plain = {key: tuple(shapes[name]) for key, name in names.items()}

    depths = count_layers(plain)
    rules = [rule for rule in expand(depths) if scope(rule.path)]
    used, ignored = {rule.key: rule for rule in rules}, unused(depths)
    missing = [key for key in used if key not in plain]
    found += [Fault("missing", key.removeprefix(prefix), f"for {used[key].path}") for key in missing]
    found += [Fault("unknown", name) for key, name in names.items() if key not in used and key not in ignored]

    config, unfit = _infer(plain, vision_head_dim, llama_head_dim, parts={rule.path.split("/")[0] for rule in rules})
    found += unfit
    try:
        abstract = flatten(emu.abstract(_as_config(config)))
    except UserError as error:  # sizes that no model can have
        raise UserError(report(where, [*found, Fault("impossible", str(error))], layout)) from error
    targets = {path: leaf.shape for path, leaf in abstract.items() if scope(path)}
    found += _unassigned(rules, targets)
    for rule in rules:
        if rule.key in plain and rule.path in targets:
            expected = published_shape(rule, targets[rule.path])
            if plain[rule.key] != expected:
                detail = f"{plain[rule.key]}, expected {expected} for {rule.path}"
                found.append(Fault("misshapen", names[rule.key], detail))
    adapters, unfit = _adapters(halves, shapes, plain, used)
    found += unfit
    if found:
        raise UserError(report(where, found, layout))
    leftover = tuple(name for key, name in names.items() if key in ignored)
    targets = {path: tuple(shape) for path, shape in targets.items()}
    return Match(config, targets, rules, {key: names[key] for key in used}, adapters, leftover)


def _published_names(
    keys: Mapping[str, Any], prefix: str
) -> tuple[dict[str, str], dict[str, dict[str, str]], list[Fault]]:
    """The file's keys as published key -> file's key; LoRA's apart, as adapted weight -> {"A" | "B": file's key}."""
    names: dict[str, str] = {}
    halves: dict[str, dict[str, str]] = {}
    faults = []
    for name in keys:
        key = prefix + name
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
                f"{tuple(shapes[a])}, with {b} {tuple(shapes[b])}; expected (r, in) and (out, r) of "
                f"{plain.get(key, 'its weight')}"
            )
            faults.append(Fault("misshapen", a, detail))
    return adapters, faults


# ------------------------------------------------------------------------------------------------ both ways


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


def plan(
    tensors: Tensors,
    *,
    vision_head_dim: int = VISION_HEAD_DIM,
    llama_head_dim: int = LLAMA_HEAD_DIM,
    lora_alpha: float = LORA_ALPHA,
    merge_lora: bool = False,
    keep_unused: bool = False,
) -> Plan:
    """How published weights become ours.

    Args:
      merge_lora: add adapters to their weights (in float32); else they become leaves of their own, `lora/…`.
      keep_unused: also carry what the model has no use for, `unused/…`, so that an export gives the whole file back.

    Raises:
      UserError: not an Emu's; lists everything that does not fit at once.
    """
    heads: dict[str, Any] = {"vision_head_dim": vision_head_dim, "llama_head_dim": llama_head_dim}
    matched = match(tensors.shapes, where=str(tensors.path), faults=unreadable(tensors), **heads)
    shapes = {f"params/{path}": shape for path, shape in matched.targets.items()}
    steps = assign(matched, tensors, lora_alpha if merge_lora else None)
    dtypes: dict[str, np.dtype] = {}
    if matched.adapters and not merge_lora:
        lora, kept = _keep_adapters(matched, tensors)
        steps += lora
        for leaf, (shape, dtype) in kept.items():
            shapes[leaf], dtypes[leaf] = shape, dtype
    names = dict(matched.names)
    if keep_unused:
        keys = _published_names({name: None for name in matched.unused}, "")[0]
        for key, name in keys.items():
            leaf = f"unused/{key}"
            shapes[leaf], dtypes[leaf], names[key] = tensors.shapes[name], np.dtype(tensors.dtypes[name]), name
            steps.append(Step(leaf, None, (name,), lambda x: x))
    ranks = sorted({tensors.shapes[a][0] for a, _ in matched.adapters.values()})
    about = {
        "format": "emu",
        "unused": list(matched.unused),
        "beside": list(tensors.beside),
        "adapters": list(matched.adapters),
        "lora": {"ranks": ranks, "targets": _targets(matched), "alpha": lora_alpha, "merged": merge_lora}
        if ranks
        else None,
        "dtypes": source_dtypes(tensors, names),
    }
    return Plan(tensors, {"objective": "pretrain", "model": matched.config}, shapes, tuple(steps), dtypes, about)


def assign(matched: Match, tensors: Tensors, lora_alpha: float | None = None) -> list[Step]:
    """A step a rule; where `lora_alpha` is given, adapted weights are W + alpha / r * B A."""

    def merged(transform: Callable, a_name: str) -> Callable[..., np.ndarray]:
        assert lora_alpha is not None
        factor = np.float32(lora_alpha / tensors.shapes[a_name][0])

        def make(value: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
            return transform(value.astype(np.float32) + factor * (b.astype(np.float32) @ a.astype(np.float32)))

        return make

    steps = []
    for rule in matched.rules:
        forward, names = TRANSFORMS[rule.transform].forward, (matched.names[rule.key],)
        if lora_alpha is not None and rule.key in matched.adapters:
            names += matched.adapters[rule.key]
            forward = merged(forward, names[1])
        steps.append(Step(f"params/{rule.path}", rule.layer, names, forward))
    return steps


def _keep_adapters(matched: Match, tensors: Tensors) -> tuple[list[Step], dict[str, tuple[tuple[int, ...], np.dtype]]]:
    """Steps, shapes and dtypes of the leaves `lora/<path of a kernel>/lora_a` [L, in, r] and `…/lora_b` [L, r, out]."""
    adapted: dict[str, dict[int, tuple[str, str]]] = {}
    for rule in matched.rules:
        if rule.key in matched.adapters:
            assert rule.layer is not None  # what is adapted lies in the stacked blocks
            adapted.setdefault(rule.path.removesuffix("/kernel"), {})[rule.layer] = matched.adapters[rule.key]
    steps, leaves, faults = [], {}, []
    for path, layers in adapted.items():
        depth = matched.targets[f"{path}/kernel"][0]
        for side, name in enumerate(ADAPTER_LEAVES):
            leaf, some = f"lora/{path}/{name}", layers[min(layers)][side]
            shape, dtype = tensors.shapes[some], np.dtype(tensors.dtypes[some])
            leaves[leaf] = ((depth, *shape[::-1]), dtype)
            for layer in range(depth):
                if layer not in layers:
                    faults.append(Fault("missing", f"lora_{'AB'[side]} of layer {layer}", f"for {leaf}"))
                elif tensors.shapes[layers[layer][side]] != shape:
                    faults.append(Fault("misshapen", layers[layer][side], f"expected {shape}, as in other layers"))
                else:
                    steps.append(Step(leaf, layer, (layers[layer][side],), TRANSFORMS["transpose"].forward))
    if faults:
        raise UserError(report(str(tensors.path), faults, LAYOUT))
    return steps, leaves


def _targets(matched: Match) -> list[str]:
    """The language model's projections that have adapters, by our names and in the order of the tables."""
    paths = (rule.path for rule in matched.rules if rule.key in matched.adapters)
    return list(dict.fromkeys(path.split("/")[-2] for path in paths if path.startswith(BLOCKS)))


def load(
    path: str | Path, *, dtype: str = "float32", merge_lora: bool = True, **settings: Any
) -> tuple[dict[str, Any], emu.Params, Plan]:
    """Reads published weights into memory.

    Args:
      path: a folder with multimodal_encoder/pytorch_model.bin (or the one above its `pretrain`), or a `.bin`,
        `.pt` or `.safetensors` file.
      dtype: of the parameters, float32 or bfloat16.
      merge_lora: add adapters to their weights in float32; else they stand beside them, as in training.
      settings: of `plan`: vision_head_dim, llama_head_dim, lora_alpha.

    Returns:
      `config.model` as a plain dict, the nested dict of NumPy parameters, and what was done.

    Raises:
      UserError: no such weights, not readable, or not an Emu's; lists everything that does not fit at once.
    """
    work = plan(TensorFile(find_weights(path)), merge_lora=merge_lora, **settings)
    model, found = work.config["model"], gather(work, dtype)
    if "lora" not in found:
        return model, found["params"], work
    about, elsewhere = work.about["lora"], [name for name in flatten(found["lora"]) if not name.startswith(BLOCKS)]
    if len(about["ranks"]) > 1 or elsewhere:
        what = f"an adapter of {elsewhere[0][:-2]}" if elsewhere else f"adapters of ranks {about['ranks']}"
        raise UserError(
            f"{path}: {what}; beside the weights, those of LLaMA's blocks can stand, of one rank; merge them"
        )
    fields = {"lora_rank": about["ranks"][0], "lora_alpha": about["alpha"], "lora_targets": tuple(about["targets"])}
    return model | {"llama": model["llama"] | fields}, join(found["params"], found["lora"]), work


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
