"""The published Emu checkpoint <-> our parameters: one table, checked in both directions.

In: `pretrain/multimodal_encoder/pytorch_model.bin`, `Emu-instruct.pt` or the same keys in a `.safetensors` file. Out:
a `Conversion`; sizes are inferred from the shapes. Every key is used exactly once or listed as unused, and every
parameter is assigned exactly once. All keys that are missing, unknown, misshapen or repeated are reported together, and
nothing is returned. `scope` narrows the table to one part, for files that hold only that.

One tensor has three names: the *file's* key (`decoder.lm.base_model.model.lm_head.weight` in Emu-I), the *published*
key that the table uses (`decoder.lm.lm_head.weight`), and our path (`llama/lm_head/kernel`).
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from emu_jax.checkpoints.convert.conversion import Assignment, Conversion, source_dtypes, unreadable
from emu_jax.checkpoints.convert.emu_keys import (
    BASE_LAYER,
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
from emu_jax.checkpoints.convert.tensor_files import Tensors
from emu_jax.errors import UserError
from emu_jax.models import emu
from emu_jax.models.layers import ADAPTER_LEAVES
from emu_jax.models.paths import flatten

LAYOUT = "the published Emu's layout"

# The published model's values that shapes do not show.
VISION_HEAD_DIM = 88
LLAMA_HEAD_DIM = 128
LORA_ALPHA = 16.0
BLOCKS = "llama/blocks/"  # the kernels that can have adapters in training

Scope = Callable[[str], bool]  # whether a file should hold the parameter at one of our paths


def everything(path: str) -> bool:
    """The scope of a whole Emu."""
    return True


def table(config: emu.EmuConfig | Mapping[str, Any]) -> list[Rule]:
    """A rule for every key that a published model of these sizes has and uses."""
    config = _as_config(config)
    return table_of(vision=config.vision.layers, causal=config.causal.layers, llama=config.llama.layers)


def table_of(**depths: int) -> list[Rule]:
    """The rules of a model whose parts have these numbers of layers (default: 0)."""
    return expand(dict.fromkeys(emu.PARTS, 0) | depths)


def _as_config(config: emu.EmuConfig | Mapping[str, Any]) -> emu.EmuConfig:
    return config if isinstance(config, emu.EmuConfig) else emu.EmuConfig.from_dict(config)


def published_shapes(config: emu.EmuConfig | Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Published key -> shape, for every key that a model of these sizes uses; allocates nothing."""
    config = _as_config(config)
    targets = flatten(emu.abstract(config))
    return {rule.key: published_shape(rule, targets[rule.path].shape) for rule in table(config)}


def published_shape(rule: Rule, ours: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in the file of the tensor that becomes `ours` (with the layers' axis, if it has one)."""
    # One zero, broadcast: the transforms run on it without allocating the tensor.
    stand_in = np.broadcast_to(np.float32(0), ours if rule.layer is None else ours[1:])
    return TRANSFORMS[rule.transform].inverse(stand_in).shape


# ----------------------------------------------------------------------------------------- sizes from shapes


def infer_config(
    shapes: Mapping[str, tuple[int, ...]],
    *,
    vision_head_dim: int = VISION_HEAD_DIM,
    llama_head_dim: int = LLAMA_HEAD_DIM,
) -> dict[str, Any]:
    """Infers `config.model` from published keys and shapes.

    Args:
      shapes: published key -> shape (`decoder.lm.model…`, without prefixes).
      vision_head_dim: not visible in shapes; the default is the published model's.
      llama_head_dim: used only if the file has no `rotary_emb.inv_freq`, which shows it.

    Raises:
      UserError: sizes cannot be inferred, or do not divide; lists every reason.
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
    """The config, with 2 in place of every size that cannot be inferred, and the faults among the sizes of `parts`."""
    depths = count_layers(shapes)
    read, faults = _read_sizes(shapes, depths, parts)
    source, advice = "llama_head_dim", "it is the width of an attention head: pass the model's own"
    vision_heads, unfit = _heads(read, "vision width", vision_head_dim, "vision_head_dim", advice)
    faults += unfit
    if frequencies := _votes(shapes, depths, (FREQUENCIES,)):
        llama_head_dim = 2 * Counter(frequencies).most_common(1)[0][0]
        source, advice = "rotary_emb.inv_freq", "a head is twice as wide as it is long"
    llama_heads, unfit = _heads(read, "llama width", llama_head_dim, source, advice)
    faults += unfit
    kv_heads, unfit = (llama_heads, ()) if unfit else _heads(read, "llama key width", llama_head_dim, source, advice)
    faults += unfit
    if llama_heads % kv_heads:
        detail = f"{kv_heads} heads of keys do not divide {llama_heads} heads of queries"
        faults.append(Fault("indivisible", WITNESSES["llama key width"][0][0], detail))
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
            "kv_heads": kv_heads,
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


def _votes(
    shapes: Mapping[str, tuple[int, ...]], depths: Mapping[str, int], witnesses: Iterable[tuple[str, int]]
) -> list[int]:
    """The sizes that the witnesses show, one per tensor."""
    layers = range(max(depths.values()))
    # A key without {layer} is the same for every layer, and counts once.
    keys = dict.fromkeys((key.format(layer=i), axis) for key, axis in witnesses for i in layers)
    seen = [shapes[key][axis] for key, axis in keys if len(shapes.get(key, ())) > axis]
    return [size for size in seen if size > 0]


def _read_sizes(
    shapes: Mapping[str, tuple[int, ...]], depths: Mapping[str, int], parts: Container[str]
) -> tuple[dict[str, int], list[Fault]]:
    """The sizes of `parts` by the names in `WITNESSES`, and a fault for every size that no tensor shows."""
    read: dict[str, int] = {}
    faults = []
    for size, witnesses in WITNESSES.items():
        part = size.split()[0]
        if PART_OF.get(part, part) not in parts:
            continue
        if votes := _votes(shapes, depths, witnesses):
            read[size] = Counter(votes).most_common(1)[0][0]
        else:
            keys = " or ".join(key for key, _ in witnesses)
            faults.append(Fault("unknown size", size, f"read off the shape of {keys}"))
    return read, faults


def _heads(
    read: Mapping[str, int], width: str, head_dim: int, source: str, advice: str
) -> tuple[int, tuple[Fault, ...]]:
    """The number of heads, with a fault if `head_dim` does not divide the size that is named `width`."""
    if width not in read:
        return 1, ()
    if head_dim > 0 and read[width] % head_dim == 0:
        return read[width] // head_dim, ()
    detail = f"{head_dim} does not divide the {width} {read[width]}; {advice}"
    return 1, (Fault("indivisible", source, detail),)


# ------------------------------------------------------------------------------------------- every key, once


@dataclasses.dataclass(frozen=True)
class Match:
    """The keys of a file, sorted by their use. Names in the values are the file's keys.

    Attributes:
      config: `config.model`, as a plain dict; the sizes of parts outside the scope are meaningless.
      targets: our path -> shape. axes: our path -> logical axes.
      rules: the assignments to make, in the table's order.
      names: published key -> file's key, for every rule.
      adapters: published key of an adapted weight -> file's keys of lora_A [r, in] and lora_B [out, r].
      unused: keys that the table lists as unused.
    """

    config: dict[str, Any]
    targets: dict[str, tuple[int, ...]]
    axes: dict[str, tuple[str | None, ...]]
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
    """Finds the use of every key of a file from names and shapes; reads no data.

    Args:
      shapes: file's key -> shape.
      where: the file, for errors.
      vision_head_dim, llama_head_dim: as in `infer_config`.
      faults: found earlier, to be reported together with those found here.
      prefix: the beginning of the published keys that a file of one part omits.
      scope: the paths that the file must provide.
      layout: the expected layout, for errors.

    Raises:
      UserError: any key is missing, unknown, misshapen or repeated, or any parameter is not assigned exactly
        once. Its first line is a summary, followed by a line for every fault.
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
        axes = flatten(emu.logical_axes(_as_config(config)))
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
    return Match(config, targets, axes, rules, {key: names[key] for key in used}, adapters, leftover)


def _published_names(
    keys: Mapping[str, Any], prefix: str
) -> tuple[dict[str, str], dict[str, dict[str, str]], list[Fault]]:
    """Published key -> file's key; for LoRA, adapted weight -> {"A" | "B": file's key}; and faults of repeated keys."""
    names: dict[str, str] = {}
    halves: dict[str, dict[str, str]] = {}
    faults = []
    first = ""  # name of the adapter
    for name in keys:
        key = prefix + name
        for before, after in PREFIXES:
            if key.startswith(before):
                key = after + key.removeprefix(before)
        if key.endswith(BASE_LAYER):
            key = f"{key.removesuffix(BASE_LAYER)}.weight"
        taken, slot = names, key
        if lora := LORA.fullmatch(key):
            taken, slot = halves.setdefault(f"{lora['weight']}.weight", {}), lora["side"]
            adapter = lora["adapter"] or "default"
            if adapter != (first := first or adapter):
                faults.append(Fault("unknown", name, f"a second adapter, beside {first!r}; keep one"))
                continue
        if slot in taken:
            faults.append(Fault("repeated", name, f"the same tensor as {taken[slot]}"))
        else:
            taken[slot] = name
    return names, halves, faults


def _unassigned(rules: list[Rule], targets: Mapping[str, tuple[int, ...]]) -> list[Fault]:
    """A fault for every parameter, or layer of one, that the rules do not assign exactly once."""
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
    """The complete pairs A [r, in] and B [out, r] that fit their weight [out, in], and the faults of all others."""
    adapters, faults = {}, []
    for key, pair in halves.items():
        if key not in used or used[key].transform != "transpose":
            faults += [Fault("unknown", name, f"{key} is not a matrix to adapt") for name in pair.values()]
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


# --------------------------------------------------------------------------------------------- both directions


def find_weights(path: str | Path) -> Path:
    """The file of multimodal weights: `path` itself, or the one in the published download's folder."""
    path = Path(path)
    files = [path / folder / "multimodal_encoder" / "pytorch_model.bin" for folder in ("", "pretrain")]
    if not path.is_dir():
        return path
    for file in files:
        if file.is_file():
            return file
    other = sorted(path.glob("*.pt"))
    advice = f"; pass {other[0]} for the weights in that file" if other else ""
    raise UserError(f"{path}: holds no weights; expected multimodal_encoder/pytorch_model.bin in it{advice}")


def conversion(
    tensors: Tensors,
    *,
    vision_head_dim: int = VISION_HEAD_DIM,
    llama_head_dim: int = LLAMA_HEAD_DIM,
    lora_alpha: float = LORA_ALPHA,
    merge_lora: bool = False,
    keep_unused: bool = False,
) -> Conversion:
    """Converts published weights to an Emu.

    Args:
      vision_head_dim, llama_head_dim: as in `infer_config`.
      lora_alpha: scales the adapters, if the file has any.
      merge_lora: add adapters to their weights, in float32; otherwise they become leaves of their own, `lora/…`.
      keep_unused: also carry over the tensors that the model does not use, as `unused/…`, so that an export can restore
        the whole file.

    Raises:
      UserError: not an Emu's weights; lists everything that does not fit.
    """
    heads: dict[str, Any] = {"vision_head_dim": vision_head_dim, "llama_head_dim": llama_head_dim}
    matched = match(tensors.shapes, where=str(tensors.path), faults=unreadable(tensors), **heads)
    shapes = {f"params/{path}": shape for path, shape in matched.targets.items()}
    assignments = assign(matched, tensors, lora_alpha if merge_lora else None)
    dtypes: dict[str, np.dtype] = {}
    if matched.adapters and not merge_lora:
        lora, kept = _keep_adapters(matched, tensors)
        assignments += lora
        for leaf, (shape, dtype) in kept.items():
            shapes[leaf], dtypes[leaf] = shape, dtype
    names = dict(matched.names)
    if keep_unused:
        keys = _published_names({name: None for name in matched.unused}, "")[0]
        for key, name in keys.items():
            leaf = f"unused/{key}"
            shapes[leaf], dtypes[leaf], names[key] = tensors.shapes[name], np.dtype(tensors.dtypes[name]), name
            assignments.append(Assignment(leaf, None, (name,), lambda x: x))
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
    axes = {f"params/{path}": logical for path, logical in matched.axes.items()}
    return Conversion(tensors, "emu", {"model": matched.config}, shapes, tuple(assignments), dtypes, axes, about)


def assign(matched: Match, tensors: Tensors, lora_alpha: float | None = None) -> list[Assignment]:
    """An assignment per rule; with `lora_alpha`, adapted weights are W + alpha / r * B A."""

    def merged(transform: Callable, a_name: str) -> Callable[..., np.ndarray]:
        assert lora_alpha is not None
        factor = np.float32(lora_alpha / tensors.shapes[a_name][0])

        def make(value: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
            return transform(value.astype(np.float32) + factor * (b.astype(np.float32) @ a.astype(np.float32)))

        return make

    assignments = []
    for rule in matched.rules:
        forward, names = TRANSFORMS[rule.transform].forward, (matched.names[rule.key],)
        if lora_alpha is not None and rule.key in matched.adapters:
            names += matched.adapters[rule.key]
            forward = merged(forward, names[1])
        assignments.append(Assignment(f"params/{rule.path}", rule.layer, names, forward))
    return assignments


def _keep_adapters(
    matched: Match, tensors: Tensors
) -> tuple[list[Assignment], dict[str, tuple[tuple[int, ...], np.dtype]]]:
    """Assigns the leaves `lora/<path of a kernel>/lora_a` [L, in, r] and `…/lora_b` [L, r, out]; shapes and dtypes."""
    adapted: dict[str, dict[int, tuple[str, str]]] = {}
    for rule in matched.rules:
        if rule.key in matched.adapters:
            assert rule.layer is not None  # adapted kernels are in the stacked blocks
            adapted.setdefault(rule.path.removesuffix("/kernel"), {})[rule.layer] = matched.adapters[rule.key]
    assignments, leaves, faults = [], {}, []
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
                    transpose = TRANSFORMS["transpose"].forward
                    assignments.append(Assignment(leaf, layer, (layers[layer][side],), transpose))
    if faults:
        raise UserError(report(str(tensors.path), faults, LAYOUT))
    return assignments, leaves


def _targets(matched: Match) -> list[str]:
    """Our names of the language model's projections that have adapters, in the order of the table."""
    paths = (rule.path for rule in matched.rules if rule.key in matched.adapters)
    return list(dict.fromkeys(path.split("/")[-2] for path in paths if path.startswith(BLOCKS)))


def to_published(params: emu.Params, config: emu.EmuConfig | Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """Our parameters -> (published key, contiguous array) in the parameters' dtype, one at a time; undoes `conversion`.

    Raises:
      UserError: the parameters do not fit the config; lists every path. Raised before the first key.
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
            # Contiguous, because savers of tensors write memory in its order.
            yield rule.key, np.ascontiguousarray(TRANSFORMS[rule.transform].inverse(value))

    return tensors()
