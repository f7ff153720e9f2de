"""Our checkpoints -> the formats that the rest of the world reads: `emu-jax export --from … --to … --format …`.

    emu         multimodal_encoder/pytorch_model.bin, or with LoRA Emu-instruct.pt; unet, vae, scheduler where it draws
    llama       the language model alone, as a Hugging Face folder; of one with LoRA, merged
    llama-base  the same without its LoRA: what PEFT puts that of `peft` on
    diffusers   unet, vae and scheduler
    peft        LoRA alone, as PEFT keeps it

Of a run that keeps an EMA, that is exported unless `--weights raw` asks for the last step's parameters. A leaf's layers
are read, cast and written one at a time, and each leaf's digest is checked on the way. What came from published files
goes back in the precision that it had there, unless another one is asked for.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from tqdm import tqdm

from emu_jax.checkpoints.convert import diffusers, emu, llama
from emu_jax.checkpoints.convert.emu_keys import PREFIXES, TRANSFORMS, Rule
from emu_jax.checkpoints.convert.tensor_writers import TensorWriter
from emu_jax.checkpoints.layout import SAFETY_CHECKER, SCHEDULER, UNET, VAE
from emu_jax.checkpoints.store import (
    EMU,
    averaged_leaves,
    is_checkpoint,
    newest_folder,
    read_meta,
    unpack_tokenizer,
    weights_of_parts,
)
from emu_jax.checkpoints.streamed import LeafReader
from emu_jax.errors import UserError
from emu_jax.models.layers import ADAPTER_LEAVES
from emu_jax.models.unet import UNetConfig

log = logging.getLogger(__name__)

DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
SHARD = 5 << 30  # bytes of a file, at most, where a format allows several
PEFT_LM, LM = PREFIXES[1]  # what PEFT wraps the language model's keys in

Tensor = tuple[str, tuple[int, ...], np.dtype, Callable[[], np.ndarray]]  # name, shape, dtype in the file, its value


class Checkpoint:
    """What an export reads: config, leaves and origin of a checkpoint of ours.

    `weights`, of `checkpoint.WEIGHTS`, says whether leaves of `params` are their EMA.
    """

    def __init__(self, path: Path, weights: str = "auto"):
        if not is_checkpoint(path):
            raise UserError(f"--from {path}: not a work directory or a checkpoint of emu_jax")
        self.path = path
        self.folder = newest_folder(path)
        self.meta = read_meta(self.folder)
        self.config: dict[str, Any] = self.meta["config"]
        self.source: dict[str, Any] = self.meta.get("source") or {}
        self.averaged = averaged_leaves(path, self.meta, weights)
        self.leaves = LeafReader(self.folder, self.meta, self.averaged)
        self.tokenizer = unpack_tokenizer(self.meta["tokenizer"], path)

    def model(self, *, weights: bool = True) -> dict[str, Any]:
        """`config.model`, if this is an Emu; `weights`: whose kernels can be exported, beside its adapters."""
        model = self.config.get("model")
        if self.config.get("objective") not in EMU or model is None:
            raise UserError(f"--from {self.path}: holds no Emu (its objective is {self.config.get('objective')!r})")
        if weights and model["llama"].get("int8"):
            own = ", and LoRA from here with --format peft" if self.has_lora() else ""
            raise UserError(f"--from {self.path}: holds int8 weights; export the checkpoint they were made from{own}")
        return model

    def has_lora(self) -> bool:
        return any(self.adapter(name.rpartition("/")[0].partition("/")[2], "lora_a") for name in self.leaves.shapes)

    def adapter(self, path: str, name: str) -> str | None:
        """The leaf `lora_a` [L, in, r] or `lora_b` [L, r, out] of a linear map's adapter, where it has one.

        What was converted stands apart from the weights, in `lora/`; what was trained here, beside them.
        """
        return next((n for n in (f"lora/{path}/{name}", f"params/{path}/{name}") if n in self.leaves.shapes), None)

    def lora(self) -> dict[str, Any]:
        """Rank, alpha and dropout of the adapters; files of others do not tell how they were trained."""
        if found := self.source.get("lora"):
            return {"rank": found["ranks"][0], "alpha": found["alpha"], "dropout": 0.0}
        llama = self.config["model"]["llama"]
        return {name: llama.get(f"lora_{name}", 0.0) for name in ("rank", "alpha", "dropout")}

    def dtype_of(self, key: str, leaf: str, asked: str | None) -> np.dtype:
        """A tensor's precision in the file: what was asked for, else what it came in, else its own."""
        if asked is not None:
            return DTYPES[asked]
        return np.dtype(self.source.get("dtypes", {}).get(key, self.leaves.dtypes[leaf]))


def export(
    source: Path,
    folder: Path,
    form: str,
    *,
    dtype: str | None = None,
    merge_lora: bool = False,
    weights: str = "auto",
) -> list[Path]:
    """Writes `source` in a foreign format into the new `folder`; returns the files of tensors.

    Args:
      source: a work directory or a converted checkpoint; for diffusers also a folder with `unet` and `vae` in it.
      form: emu, llama, llama-base, diffusers or peft.
      dtype: float32, bfloat16 or float16; None: as `Checkpoint.dtype_of` says.
      merge_lora: add adapters to their weights.
      weights: of a run with an EMA, "ema" or "raw", the last step's; "auto" is the EMA where it keeps one.

    Raises:
      UserError: the source does not hold what the format needs; nothing is left behind.
    """
    if form not in FORMATS:
        raise UserError(f"--format {form}: unknown; choose one of {', '.join(FORMATS)}")
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"--dtype {dtype}: unknown; choose one of {', '.join(DTYPES)}")
    if folder.exists():
        raise UserError(f"--to {folder}: it exists; name a new folder, or remove it")
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        files = FORMATS[form](source, partial, dtype, merge_lora, weights)
        os.replace(partial, folder)
    except OSError as error:
        raise UserError(f"--to {folder}: cannot be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return [folder / file.relative_to(partial) for file in files]


# ------------------------------------------------------------------------------------------------ one format each


def _emu(source: Path, folder: Path, dtype: str | None, merge_lora: bool, weights: str) -> list[Path]:
    checkpoint = Checkpoint(source, weights)
    model = checkpoint.model()
    if (kind := model["causal"].get("kind", "causal")) != "causal":
        raise UserError(
            f"--from {source}: its model.causal.kind is {kind}, and the published layout holds causal alone; "
            "--format llama exports its language model"
        )
    if model.get("standardise"):
        log.warning(
            "%s: this model normalises its images' embeddings by running statistics (model.standardise), for which "
            "the published layout has no place: what loads these files reads images otherwise than here",
            source,
        )
    apart = checkpoint.has_lora() and not merge_lora
    rules = emu.table(model)
    tensors = [*_rules(checkpoint, rules, dtype, merge_lora), *_unused(checkpoint, dtype)]
    if apart:
        adapters = _adapters(checkpoint, rules, dtype)
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
        shutil.copytree(source / SAFETY_CHECKER, folder / SAFETY_CHECKER)
    return files


def _llama(source: Path, folder: Path, dtype: str | None, merge_lora: bool, weights: str) -> list[Path]:
    if not merge_lora and Checkpoint(source).has_lora():
        raise UserError(
            f"--from {source}: holds LoRA beside its weights; add --merge-lora, or use --format llama-base and peft"
        )
    return _language_model(source, folder, dtype, merge_lora, weights)


def _llama_base(source: Path, folder: Path, dtype: str | None, merge_lora: bool, weights: str) -> list[Path]:
    if merge_lora:
        raise UserError("--format llama-base is without LoRA; use --format llama with --merge-lora")
    return _language_model(source, folder, dtype, False, weights)


def _language_model(source: Path, folder: Path, dtype: str | None, merge_lora: bool, weights: str) -> list[Path]:
    checkpoint = Checkpoint(source, weights)
    alone = checkpoint.config.get("objective") == "llama"
    sizes = checkpoint.config["model"]["llama"] if alone else checkpoint.model()["llama"]
    rules = [rule for rule in emu.table_of(llama=sizes["layers"]) if llama.in_scope(rule.path)]
    tensors: list[Tensor] = [
        (name.removeprefix(llama.PREFIX), shape, kind, value)
        for name, shape, kind, value in _rules(checkpoint, rules, dtype, merge_lora)
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
    if checkpoint.tokenizer is not None:
        (folder / llama.TOKENIZER).write_bytes(checkpoint.tokenizer.proto)
        if not alone:
            _write_json(folder / "added_tokens.json", checkpoint.tokenizer.added)
    return [folder / name for name in names]


def _diffusers(source: Path, folder: Path, dtype: str | None, _: bool, weights: str) -> list[Path]:
    folders = {part: source / part for part in (UNET, VAE) if is_checkpoint(source / part)}
    if not folders:
        kind = Checkpoint(source).config.get("objective")
        folders = {{"decoder": UNET, "vae": VAE}.get(str(kind), ""): source}
        if "" in folders:
            raise UserError(
                f"--from {source}: holds no U-Net and no VAE; expected {UNET} and {VAE} in it, or one of them"
            )
    if weights == "ema" and not any(Checkpoint(path).averaged for path in folders.values()):
        raise UserError(
            f"--from {source}: keeps no EMA of its U-Net or VAE, and --weights ema asks for it; take raw ones"
        )
    files = []
    for part, path in folders.items():
        checkpoint = Checkpoint(path, weights_of_parts(weights))
        config = checkpoint.config
        (folder / part).mkdir()
        if part == UNET:
            described = diffusers.describe_unet(UNetConfig.from_dict(config["unet"]), config["latent_size"])
            (folder / SCHEDULER).mkdir()
            _write_json(folder / SCHEDULER / "scheduler_config.json", diffusers.describe_schedule(config["schedule"]))
        else:
            fields = dict(config["vae"])
            if "statistics/latent_square" in checkpoint.leaves.shapes:
                fields["scale"] = float(checkpoint.leaves["statistics/latent_square"]) ** -0.5
            described = diffusers.describe_vae(fields, config["image_size"])
        _write_json(folder / part / "config.json", described)
        files.append(folder / part / diffusers.WEIGHTS[0])
        _write(files[-1], list(_convolutions(checkpoint, part, dtype)))
    return files


def _peft(source: Path, folder: Path, dtype: str | None, _: bool, weights: str) -> list[Path]:
    checkpoint = Checkpoint(source, weights)
    model = checkpoint.model(weights=False)
    if not checkpoint.has_lora():
        raise UserError(
            f"--from {source}: holds no LoRA; expected a run of the objective instruct, or Emu-instruct.pt converted "
            "without --merge-lora"
        )
    tensors = [
        ("base_model.model." + name.removeprefix(LM).replace(".default.weight", ".weight"), shape, kind, value)
        for name, shape, kind, value in _adapters(checkpoint, emu.table(model), dtype)
    ]
    _write(folder / "adapter_model.safetensors", tensors)
    lora = checkpoint.lora()
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


FORMATS: dict[str, Callable[[Path, Path, str | None, bool, str], list[Path]]] = {
    "emu": _emu,
    "llama": _llama,
    "llama-base": _llama_base,
    "diffusers": _diffusers,
    "peft": _peft,
}


# --------------------------------------------------------------------------------------------- tensors of a file


def _rules(checkpoint: Checkpoint, rules: list[Rule], dtype: str | None, merge_lora: bool) -> Iterator[Tensor]:
    """The tensors of the table's rules, in their order; their values must be taken in that order too."""
    open_leaves: dict[str, Iterator[np.ndarray]] = {}

    def value(rule: Rule, leaf: str) -> np.ndarray:
        found = _next_layer(checkpoint, open_leaves, leaf, rule.layer)
        found_sides = (checkpoint.adapter(rule.path.removesuffix("/kernel"), name) for name in ADAPTER_LEAVES)
        sides = [side for side in found_sides if side is not None]
        if merge_lora and len(sides) == 2:
            a, b = (_next_layer(checkpoint, open_leaves, side, rule.layer).astype(np.float32) for side in sides)
            factor = np.float32(checkpoint.lora()["alpha"] / a.shape[-1])
            found = found.astype(np.float32) + factor * (a @ b)
        return TRANSFORMS[rule.transform].inverse(found)

    for rule in rules:
        leaf = f"params/{rule.path}"
        if leaf not in checkpoint.leaves.shapes:
            raise UserError(
                f"--from {checkpoint.path}: has no {leaf}; its config and its leaves do not belong together"
            )
        shape = emu.published_shape(rule, checkpoint.leaves.shapes[leaf])
        yield rule.key, shape, checkpoint.dtype_of(rule.key, leaf, dtype), _bound(value, rule, leaf)


def _next_layer(
    checkpoint: Checkpoint, open_leaves: dict[str, Iterator[np.ndarray]], leaf: str, layer: int | None
) -> np.ndarray:
    """All of a leaf, or its next layer; the last one ends its iterator, which checks the digest."""
    if layer is None:
        return checkpoint.leaves[leaf]
    if layer == 0:
        open_leaves[leaf] = iter(checkpoint.leaves.slices(leaf))
    value = next(open_leaves[leaf])
    if layer == checkpoint.leaves.shapes[leaf][0] - 1:
        next(open_leaves.pop(leaf), None)
    return value


def _bound(function: Callable[..., np.ndarray], *arguments: Any) -> Callable[[], np.ndarray]:
    return lambda: function(*arguments)


def _adapters(checkpoint: Checkpoint, rules: list[Rule], dtype: str | None) -> Iterator[Tensor]:
    """LoRA's tensors under their published names: `….q_proj.lora_A.default.weight` [r, in] and `lora_B` [out, r]."""
    for rule in rules:
        for ours, published in (("lora_a", "lora_A"), ("lora_b", "lora_B")):
            leaf = checkpoint.adapter(rule.path.removesuffix("/kernel"), ours)
            if leaf is not None:
                key = f"{rule.key.removesuffix('.weight')}.{published}.default.weight"
                shape = checkpoint.leaves.shapes[leaf][:0:-1]
                kind = DTYPES[dtype] if dtype else checkpoint.leaves.dtypes[leaf]
                yield key, shape, kind, _bound(lambda leaf, layer: checkpoint.leaves[leaf][layer].T, leaf, rule.layer)


def _unused(checkpoint: Checkpoint, dtype: str | None) -> Iterator[Tensor]:
    """What the published file held and Emu has no use for."""
    for leaf, shape in checkpoint.leaves.shapes.items():
        if leaf.startswith("unused/"):
            key = leaf.removeprefix("unused/")
            yield key, shape, checkpoint.dtype_of(key, leaf, dtype), _bound(checkpoint.leaves.__getitem__, leaf)


def _convolutions(checkpoint: Checkpoint, part: str, dtype: str | None) -> Iterator[Tensor]:
    """The tensors of a U-Net or VAE under diffusers' names."""
    prefix = f"params/{part}/"
    for leaf, ours in checkpoint.leaves.shapes.items():
        if leaf.startswith(prefix):
            path = leaf.removeprefix(prefix)
            key = diffusers.their_key(path)
            shape = diffusers.their_shape(path, ours)
            kind = checkpoint.dtype_of(key, leaf, dtype)
            yield key, shape, kind, _bound(_their_value, checkpoint, leaf, path, shape)


def _their_value(checkpoint: Checkpoint, leaf: str, path: str, shape: tuple[int, ...]) -> np.ndarray:
    return diffusers.to_theirs(path, checkpoint.leaves[leaf], shape)


def _peft_name(key: str) -> str:
    return PEFT_LM + key.removeprefix(LM) if key.startswith(LM) else key


def _nbytes(tensor: Tensor) -> int:
    _, shape, dtype, _ = tensor
    return int(np.prod(shape)) * dtype.itemsize


def _write(path: Path, tensors: list[Tensor], *, nest: str | None = None) -> None:
    declared = {name: (tuple(shape), dtype) for name, shape, dtype, _ in tensors}
    with (
        TensorWriter(path, declared, nest=nest) as writer,
        tqdm(total=sum(map(_nbytes, tensors)), desc=path.name, unit="B", unit_scale=True) as bar,
    ):
        for tensor in tensors:
            writer.write(tensor[0], tensor[3]())
            bar.update(_nbytes(tensor))


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
