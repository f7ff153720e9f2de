"""Our checkpoints -> the formats that other libraries read.

    emu         multimodal_encoder/pytorch_model.bin, or with LoRA Emu-instruct.pt; and the decoder's parts, if it draws
    llama       the language model as a Hugging Face folder, with LoRA merged
    llama-base  the language model without its LoRA: the base for the adapters of `peft`
    diffusers   unet, vae and scheduler
    peft        only the LoRA, in PEFT's format
    packed      our own format in one file: a model with its decoder and its tuned model, small enough to be sent

A run's EMA is exported unless `weights="raw"` asks for the last step's parameters. A leaf's layers are read, cast and
written one at a time, and every leaf's digest is checked on the way. Tensors that came from published files get the
dtype they had there, unless another one is asked for.
"""

from __future__ import annotations

import json
import logging
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np
from tqdm import tqdm

from emu_jax.checkpoints import packed
from emu_jax.checkpoints.convert import diffusers, emu, llama
from emu_jax.checkpoints.convert.emu_keys import PREFIXES, TRANSFORMS, Rule
from emu_jax.checkpoints.convert.tensor_writers import tensor_writer
from emu_jax.checkpoints.digests import digest
from emu_jax.checkpoints.layout import SAFETY_CHECKER, SCHEDULER, TUNED, UNET, VAE
from emu_jax.checkpoints.store import is_checkpoint, open_checkpoint, seal_meta, weights_of_parts
from emu_jax.checkpoints.streamed import LeafReader
from emu_jax.errors import UserError
from emu_jax.models.layers import ADAPTER_LEAVES
from emu_jax.models.unet import UNetConfig
from emu_jax.storage import Path, copy_folder, write_atomically

log = logging.getLogger(__name__)

DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
PACKED_ITEMS = ("params", "statistics", "lora")
SHARD = 5 << 30  # maximum bytes of a file, in formats that allow several
PEFT_LM, LM = PREFIXES[1]  # PEFT's prefix of the language model's keys, and the published one

Tensor = tuple[str, tuple[int, ...], np.dtype, Callable[[], np.ndarray]]  # name, shape, dtype in the file, its value


class Source:
    """A checkpoint to export: its description, and a reader of its leaves.

    Args:
      path: a work directory or checkpoint.
      weights: one of `store.WEIGHTS`: whether leaves of `params` are read from their EMA.
    """

    def __init__(self, path: Path, weights: str = "auto"):
        if not is_checkpoint(path):
            raise UserError(f"{path}: not a work directory or a checkpoint of emu_jax")
        self.path = path
        self.checkpoint = open_checkpoint(path, weights)
        self.config: dict[str, Any] = self.checkpoint.meta["config"]
        self.leaves = LeafReader(self.checkpoint.folder, self.checkpoint.meta, self.checkpoint.ema)

    def model(self, *, weights: bool = True) -> dict[str, Any]:
        """`config.model` of an Emu; `weights`: whether its kernels will be exported, and not only its adapters."""
        if self.checkpoint.holds != "emu":
            raise UserError(f"{self.path}: holds {self.checkpoint.holds}; expected emu")
        model = self.config["model"]
        if weights and (kind := model["llama"].get("quantised")):
            own = ", and the LoRA of this one in the format peft" if self.has_lora() else ""
            raise UserError(f"{self.path}: holds {kind} weights; export the checkpoint they were made from{own}")
        return model

    def has_lora(self) -> bool:
        """Whether there are adapters."""
        return any(self.adapter(name.rpartition("/")[0].partition("/")[2], "lora_a") for name in self.leaves.shapes)

    def adapter(self, path: str, name: str) -> str | None:
        """The leaf `lora_a` [L, in, r] or `lora_b` [L, r, out] of a linear map's adapter, if it has one.

        Converted adapters are stored apart from the weights, in `lora/`; those trained here, beside the kernels.
        """
        return next((n for n in (f"lora/{path}/{name}", f"params/{path}/{name}") if n in self.leaves.shapes), None)

    def lora(self) -> dict[str, Any]:
        """Rank, alpha and dropout of the adapters; foreign files do not say how they were trained."""
        if lora := self.checkpoint.source.get("lora"):
            return {"rank": lora["ranks"][0], "alpha": lora["alpha"], "dropout": 0.0}
        llama = self.config["model"]["llama"]
        return {name: llama.get(f"lora_{name}", 0.0) for name in ("rank", "alpha", "dropout")}

    def dtype_of(self, key: str, leaf: str, asked: str | None) -> np.dtype:
        """A tensor's dtype in the exported file: the one asked for, that of the foreign file, or the leaf's own."""
        if asked is not None:
            return DTYPES[asked]
        return np.dtype(self.checkpoint.source.get("dtypes", {}).get(key, self.leaves.dtypes[leaf]))


def export(
    source: Path,
    folder: Path,
    form: str,
    *,
    dtype: str | None = None,
    merge_lora: bool = False,
    weights: str = "auto",
) -> list[Path]:
    """Writes `source` to the new `folder` in a foreign format; returns the files of tensors.

    The files for a bucket are first written to the local folder for temporary files, which must have room for them.

    Args:
      source: a work directory or a converted checkpoint; for diffusers also a folder with `unet` and `vae` in it.
      form: emu, llama, llama-base, diffusers, peft or packed.
      dtype: float32, bfloat16 or float16; None: see `Source.dtype_of`.
      merge_lora: add adapters to their weights.
      weights: "ema", "raw" (the last step's parameters), or "auto": the EMA if the run keeps one.

    Raises:
      UserError: the source does not hold what the format needs; nothing is left behind.
    """
    if form not in FORMATS:
        raise UserError(f"format {form!r} is unknown; choose one of {', '.join(FORMATS)}")
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"dtype={dtype!r} is unknown; choose one of {', '.join(DTYPES)}")
    if folder.exists():
        raise UserError(f"{folder}: it exists; name a new folder, or remove it")
    try:
        with write_atomically(folder) as partial:
            partial.mkdir(parents=True)
            files = FORMATS[form](source, partial, dtype, merge_lora, weights)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror or error})") from error
    return [folder / file.relative_to(partial).as_posix() for file in files]


# --------------------------------------------------------------------------------------- one function per format


def _emu(source: Path, folder: pathlib.Path, dtype: str | None, merge_lora: bool, weights: str) -> list[pathlib.Path]:
    exported = Source(source, weights)
    model = exported.model()
    if (kind := model["causal"].get("kind", "causal")) != "causal":
        raise UserError(
            f"{source}: its model.causal.kind is {kind}, and the published layout holds only causal; the format llama "
            "exports its language model"
        )
    if model.get("standardise"):
        log.warning(
            "%s: this model normalises its images' embeddings by running statistics (model.standardise), which the "
            "published layout cannot hold: programs that load these files will see images differently",
            source,
        )
    apart = exported.has_lora() and not merge_lora
    rules = emu.table(model)
    tensors = [*_rules(exported, rules, dtype, merge_lora), *_unused(exported, dtype)]
    if apart:
        adapters = _adapters(exported, rules, dtype)
        tensors = [(_peft_name(name), shape, kind, value) for name, shape, kind, value in [*tensors, *adapters]]
        files = [folder / "Emu-instruct.pt"]
        _write(files[0], tensors, nest="module")
    else:
        files = [folder / "multimodal_encoder" / "pytorch_model.bin"]
        files[0].parent.mkdir()
        _write(files[0], tensors)
    if (source / UNET).is_dir() and (source / VAE).is_dir():
        files += _diffusers(source, folder, dtype, merge_lora, weights_of_parts(weights))
    if (source / SAFETY_CHECKER).is_dir():
        copy_folder(source / SAFETY_CHECKER, folder / SAFETY_CHECKER)
    return files


def _llama(source: Path, folder: pathlib.Path, dtype: str | None, merge_lora: bool, weights: str) -> list[pathlib.Path]:
    if not merge_lora and Source(source).has_lora():
        raise UserError(
            f"{source}: holds LoRA beside its weights; set merge_lora, or export the formats llama-base and peft"
        )
    return _language_model(source, folder, dtype, merge_lora, weights)


def _llama_base(
    source: Path, folder: pathlib.Path, dtype: str | None, merge_lora: bool, weights: str
) -> list[pathlib.Path]:
    if merge_lora:
        raise UserError("the format llama-base is without LoRA; use the format llama with merge_lora")
    return _language_model(source, folder, dtype, False, weights)


def _language_model(
    source: Path, folder: pathlib.Path, dtype: str | None, merge_lora: bool, weights: str
) -> list[pathlib.Path]:
    exported = Source(source, weights)
    part = exported.checkpoint.holds == "llama"
    sizes = exported.config["model"]["llama"] if part else exported.model()["llama"]
    rules = [rule for rule in emu.table_of(llama=sizes["layers"]) if llama.in_scope(rule.path)]
    tensors: list[Tensor] = [
        (name.removeprefix(llama.PREFIX), shape, kind, value)
        for name, shape, kind, value in _rules(exported, rules, dtype, merge_lora)
    ]
    shards: list[list[Tensor]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(map(_nbytes, shards[-1])) + _nbytes(tensor) > SHARD:
            shards.append([])
        shards[-1].append(tensor)
    names = [f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
    names = names if len(shards) > 1 else [llama.WEIGHTS[0]]
    for name, shard in zip(names, shards, strict=True):
        _write(folder / name, shard)
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(map(_nbytes, tensors))},
            "weight_map": {tensor[0]: name for name, shard in zip(names, shards, strict=True) for tensor in shard},
        }
        _write_json(folder / "model.safetensors.index.json", index)
    kinds = {kind.name for _, _, kind, _ in tensors}
    _write_json(
        folder / llama.CONFIG, llama.describe(sizes) | {"torch_dtype": kinds.pop() if len(kinds) == 1 else None}
    )
    if (tokenizer := exported.checkpoint.tokenizer) is not None:
        (folder / llama.TOKENIZER).write_bytes(tokenizer.proto)
        if not part:
            _write_json(folder / "added_tokens.json", tokenizer.added)
    return [folder / name for name in names]


def _diffusers(source: Path, folder: pathlib.Path, dtype: str | None, _: bool, weights: str) -> list[pathlib.Path]:
    folders = {part: source / part for part in (UNET, VAE) if is_checkpoint(source / part)}
    if not folders:
        holds = Source(source).checkpoint.holds
        if holds not in (UNET, VAE):
            raise UserError(f"{source}: holds no U-Net and no VAE; expected {UNET} and {VAE} in it, or one of them")
        folders = {holds: source}
    if weights == "ema" and not any(open_checkpoint(path).ema for path in folders.values()):
        raise UserError(f"{source}: keeps no EMA of its U-Net or VAE, and weights=ema asks for it; take raw ones")
    files = []
    for part, path in folders.items():
        exported = Source(path, weights_of_parts(weights))
        config = exported.config
        (folder / part).mkdir()
        if part == UNET:
            described = diffusers.describe_unet(UNetConfig.from_dict(config["unet"]), config["latent_size"])
            (folder / SCHEDULER).mkdir()
            _write_json(folder / SCHEDULER / "scheduler_config.json", diffusers.describe_schedule(config["schedule"]))
        else:
            fields = dict(config["vae"])
            if "statistics/latent_square" in exported.leaves.shapes:
                fields["scale"] = float(exported.leaves["statistics/latent_square"]) ** -0.5
            described = diffusers.describe_vae(fields, config["image_size"])
        _write_json(folder / part / "config.json", described)
        files.append(folder / part / diffusers.WEIGHTS[0])
        _write(files[-1], list(_convolutions(exported, part, dtype)))
    return files


def _peft(source: Path, folder: pathlib.Path, dtype: str | None, _: bool, weights: str) -> list[pathlib.Path]:
    exported = Source(source, weights)
    model = exported.model(weights=False)
    if not exported.has_lora():
        raise UserError(
            f"{source}: holds no LoRA; expected a run that trained adapters, or Emu-instruct.pt converted without "
            "merge_lora"
        )
    tensors = [
        ("base_model.model." + name.removeprefix(LM).replace(".default.weight", ".weight"), shape, kind, value)
        for name, shape, kind, value in _adapters(exported, emu.table(model), dtype)
    ]
    _write(folder / "adapter_model.safetensors", tensors)
    lora = exported.lora()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": lora["rank"],
        "lora_alpha": lora["alpha"],
        "lora_dropout": lora["dropout"],
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": sorted({name.rsplit(".", 3)[-3] for name, *_ in tensors}),
    }
    _write_json(folder / "adapter_config.json", config)
    return [folder / "adapter_model.safetensors"]


def _packed(
    source: Path, folder: pathlib.Path, dtype: str | None, merge_lora: bool, weights: str
) -> list[pathlib.Path]:
    if merge_lora:
        raise UserError("the format packed keeps LoRA beside its weights; use another format with merge_lora")
    exported = Source(source, weights)
    files = [_pack(exported, folder, dtype)]
    for part in (UNET, VAE, TUNED):
        if is_checkpoint(source / part):
            other = Source(source / part, weights_of_parts(weights))
            (folder / part).mkdir()
            files.append(_pack(other, folder / part, dtype, base=folder if part == TUNED else None))
    return files


def _pack(exported: Source, folder: pathlib.Path, dtype: str | None, base: pathlib.Path | None = None) -> pathlib.Path:
    """Writes a checkpoint as one file, without the leaves that `base`, another packed checkpoint, holds too."""
    leaves = exported.leaves
    names = [name for name in exported.checkpoint.leaves if name.partition("/")[0] in PACKED_ITEMS]
    shared = {} if base is None else packed.PackedArrays(base)
    digests, stored, own = {}, {}, []
    for name in names:
        shape, kind = leaves.shapes[name], leaves.dtypes[name]
        # Vectors, such as the scales of norms, take little room and lose most by rounding.
        kind = DTYPES[dtype] if dtype and len(shape) > 1 and kind in DTYPES.values() else kind
        if kind not in packed.DTYPES.values():
            raise UserError(f"{exported.path}: {name} is {kind.name}, which the format packed does not hold; use int8")
        value = leaves[name].astype(kind)
        digests[name], stored[name] = digest(value, shape), kind.name
        same = name in shared and shared[name].dtype == kind and np.array_equal(shared[name], value)
        own += [] if same else [(name, shape, kind, _bound(leaves.__getitem__, name))]
    meta = {key: exported.checkpoint.meta[key] for key in ("holds", "config", "tokenizer")}
    meta["source"] = exported.checkpoint.source
    meta["leaves"] = {name: exported.checkpoint.leaves[name] for name in names}
    metadata = {packed.META: json.dumps(seal_meta(meta | {"digests": digests, "stored": stored}))}
    if base is not None:
        metadata[packed.BASE] = os.path.relpath(base, folder)
    _write(folder / packed.FILE, own, metadata=metadata)
    return folder / packed.FILE


FORMATS: dict[str, Callable[[Path, pathlib.Path, str | None, bool, str], list[pathlib.Path]]] = {
    "emu": _emu,
    "llama": _llama,
    "llama-base": _llama_base,
    "diffusers": _diffusers,
    "peft": _peft,
    "packed": _packed,
}


# --------------------------------------------------------------------------------------------- a file's tensors


def _rules(exported: Source, rules: list[Rule], dtype: str | None, merge_lora: bool) -> Iterator[Tensor]:
    """The tensors of the rules, in their order; their values must be read in that order too."""
    open_leaves: dict[str, Iterator[np.ndarray]] = {}

    def value(rule: Rule, leaf: str) -> np.ndarray:
        kernel = _next_layer(exported, open_leaves, leaf, rule.layer)
        found_sides = (exported.adapter(rule.path.removesuffix("/kernel"), name) for name in ADAPTER_LEAVES)
        sides = [side for side in found_sides if side is not None]
        if merge_lora and len(sides) == 2:
            a, b = (_next_layer(exported, open_leaves, side, rule.layer).astype(np.float32) for side in sides)
            factor = np.float32(exported.lora()["alpha"] / a.shape[-1])
            kernel = kernel.astype(np.float32) + factor * (a @ b)
        return TRANSFORMS[rule.transform].inverse(kernel)

    for rule in rules:
        leaf = f"params/{rule.path}"
        if leaf not in exported.leaves.shapes:
            raise UserError(f"{exported.path}: has no {leaf}; its config and its leaves do not belong together")
        shape = emu.published_shape(rule, exported.leaves.shapes[leaf])
        yield rule.key, shape, exported.dtype_of(rule.key, leaf, dtype), _bound(value, rule, leaf)


def _next_layer(
    exported: Source, open_leaves: dict[str, Iterator[np.ndarray]], leaf: str, layer: int | None
) -> np.ndarray:
    """A whole leaf, or its next layer; the last layer exhausts the iterator, which checks the digest."""
    if layer is None:
        return exported.leaves[leaf]
    if layer == 0:
        open_leaves[leaf] = iter(exported.leaves.slices(leaf))
    value = next(open_leaves[leaf])
    if layer == exported.leaves.shapes[leaf][0] - 1:
        next(open_leaves.pop(leaf), None)
    return value


def _bound(function: Callable[..., np.ndarray], *arguments: Any) -> Callable[[], np.ndarray]:
    return lambda: function(*arguments)


def _adapters(exported: Source, rules: list[Rule], dtype: str | None) -> Iterator[Tensor]:
    """LoRA's tensors by their published names: `….q_proj.lora_A.default.weight` [r, in] and `lora_B` [out, r]."""
    for rule in rules:
        for ours, published in (("lora_a", "lora_A"), ("lora_b", "lora_B")):
            leaf = exported.adapter(rule.path.removesuffix("/kernel"), ours)
            if leaf is not None:
                key = f"{rule.key.removesuffix('.weight')}.{published}.default.weight"
                shape = exported.leaves.shapes[leaf][:0:-1]
                kind = DTYPES[dtype] if dtype else exported.leaves.dtypes[leaf]
                yield key, shape, kind, _bound(lambda leaf, layer: exported.leaves[leaf][layer].T, leaf, rule.layer)


def _unused(exported: Source, dtype: str | None) -> Iterator[Tensor]:
    """The published file's tensors that Emu does not use."""
    for leaf, shape in exported.leaves.shapes.items():
        if leaf.startswith("unused/"):
            key = leaf.removeprefix("unused/")
            yield key, shape, exported.dtype_of(key, leaf, dtype), _bound(exported.leaves.__getitem__, leaf)


def _convolutions(exported: Source, part: str, dtype: str | None) -> Iterator[Tensor]:
    """The tensors of a U-Net or VAE by diffusers' names."""
    prefix = f"params/{part}/"
    for leaf, ours in exported.leaves.shapes.items():
        if leaf.startswith(prefix):
            path = leaf.removeprefix(prefix)
            key = diffusers.their_key(path)
            shape = diffusers.their_shape(path, ours)
            kind = exported.dtype_of(key, leaf, dtype)
            yield key, shape, kind, _bound(_their_value, exported, leaf, path, shape)


def _their_value(exported: Source, leaf: str, path: str, shape: tuple[int, ...]) -> np.ndarray:
    return diffusers.to_theirs(path, exported.leaves[leaf], shape)


def _peft_name(key: str) -> str:
    return PEFT_LM + key.removeprefix(LM) if key.startswith(LM) else key


def _nbytes(tensor: Tensor) -> int:
    _, shape, dtype, _ = tensor
    return int(np.prod(shape)) * dtype.itemsize


def _write(
    path: pathlib.Path,
    tensors: list[Tensor],
    *,
    nest: str | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    declared = {name: (tuple(shape), dtype) for name, shape, dtype, _ in tensors}
    with (
        tensor_writer(path, declared, nest=nest, metadata=metadata) as write,
        tqdm(total=sum(map(_nbytes, tensors)), desc=path.name, unit="B", unit_scale=True) as bar,
    ):
        for tensor in tensors:
            write(tensor[0], tensor[3]())
            bar.update(_nbytes(tensor))


def _write_json(path: pathlib.Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
