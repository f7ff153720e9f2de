"""LLaMA's own files -> a conversion to the language model without its regression head.

    folder/config.json + model.safetensors or .bin, whole or in shards      Hugging Face's transformers
    folder/params.json + consolidated.00.pth, consolidated.01.pth, …        Meta's own format

The published Emu's keys of its language model are Hugging Face's behind a prefix, so the same table applies
(`emu_keys.py`). Meta's files are presented under the same names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from emu_jax.checkpoints.convert import emu
from emu_jax.checkpoints.convert.conversion import Conversion, source_dtypes, unreadable
from emu_jax.checkpoints.convert.tensor_files import TensorFile, Tensors, open_tensors
from emu_jax.errors import UserError
from emu_jax.storage import read_json_object

PREFIX = "decoder.lm."  # before Hugging Face's keys in Emu's
CONFIG, PARAMS = "config.json", "params.json"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
TOKENIZER = "tokenizer.model"
META_FILES = re.compile(r"consolidated\.\d\d\.pth")
LAYOUT = "LLaMA's layout"

# The architecture is fixed: config.json's key -> the values that it may have; absent or null is the first one.
FIXED: dict[str, tuple] = {
    "model_type": ("llama",),
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "tie_word_embeddings": (False,),
    "partial_rotary_factor": (1,),
    "quantization_config": (None,),
}
# Where the file does not say, the defaults of transformers. `pretraining_tp` only says how products were summed.
ABSENT = {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048}
CONTEXTS = ("max_position_embeddings", "max_sequence_length")  # of today; in files of March 2023

# Meta's key -> (Hugging Face's, the axis that is split over model-parallel shards; None: the same in all).
META: dict[str, tuple[str, int | None]] = {
    "tok_embeddings.weight": ("model.embed_tokens.weight", 1),
    "norm.weight": ("model.norm.weight", None),
    "output.weight": ("lm_head.weight", 0),
    "layers.{}.attention.wq.weight": ("model.layers.{}.self_attn.q_proj.weight", 0),
    "layers.{}.attention.wk.weight": ("model.layers.{}.self_attn.k_proj.weight", 0),
    "layers.{}.attention.wv.weight": ("model.layers.{}.self_attn.v_proj.weight", 0),
    "layers.{}.attention.wo.weight": ("model.layers.{}.self_attn.o_proj.weight", 1),
    "layers.{}.feed_forward.w1.weight": ("model.layers.{}.mlp.gate_proj.weight", 0),
    "layers.{}.feed_forward.w2.weight": ("model.layers.{}.mlp.down_proj.weight", 1),
    "layers.{}.feed_forward.w3.weight": ("model.layers.{}.mlp.up_proj.weight", 0),
    "layers.{}.attention_norm.weight": ("model.layers.{}.input_layernorm.weight", None),
    "layers.{}.ffn_norm.weight": ("model.layers.{}.post_attention_layernorm.weight", None),
}
META_UNUSED = re.compile(r"(layers\.\d+\.attention\.inner_attention\.)?rope\.freqs")


def in_scope(path: str) -> bool:
    """Whether LLaMA's files hold the parameter at one of our paths."""
    return path.startswith("llama/") and not path.startswith("llama/visual_head/")


def is_llama(folder: Path) -> bool:
    """Whether a folder looks like one of the two formats."""
    return (folder / PARAMS).is_file() or (folder / CONFIG).is_file()


def conversion(folder: Path) -> Conversion:
    """Converts a folder's LLaMA to our language model.

    Raises:
      UserError: not a LLaMA of our architecture; lists everything that does not fit.
    """
    if (folder / PARAMS).is_file():
        meta = MetaTensors(folder)
        tensors: Tensors = meta
        fields = meta.fields
    else:
        fields = _fields(folder / CONFIG)
        tensors = open_tensors(folder, WEIGHTS, f"{' or '.join(WEIGHTS)}, or shards of one of them")
    width, heads = fields["width"], fields["heads"]
    if min(width, heads) < 1 or width % heads:
        raise UserError(
            f"{folder}: its config says {heads} attention heads and a width of {width}, which do not divide"
        )
    matched = emu.match(
        tensors.shapes,
        where=str(tensors.path),
        llama_head_dim=width // heads,
        faults=unreadable(tensors),
        prefix=PREFIX,
        scope=in_scope,
        layout=LAYOUT,
    )
    for name, expected in fields.items():
        if name in SHOWN and (found := matched.config["llama"][name]) != expected:
            raise UserError(f"{folder}: its config says a {name} of {expected}, its weights {found}")
    model = {"llama": matched.config["llama"] | fields}
    shapes = {f"params/{path}": shape for path, shape in matched.targets.items()}
    axes = {f"params/{path}": logical for path, logical in matched.axes.items()}
    about = {
        "format": "llama",
        "unused": list(matched.unused),
        "dtypes": source_dtypes(tensors, matched.names),
    }
    return Conversion(
        tensors, "llama", {"model": model}, shapes, tuple(emu.assign(matched, tensors)), axes=axes, about=about
    )


def _fields(file: Path) -> dict[str, Any]:
    """The fields of `config.model.llama` in config.json: those that shapes do not show, and those of `SHOWN`."""
    config = read_json_object(file, "a LLaMA's config.json")
    wrong = [
        f"{key}={config[key]!r} (expected {values[0]!r})"
        for key, values in FIXED.items()
        if config.get(key) is not None and config[key] not in values
    ]
    scaled, base = _rope(config)
    if scaled:
        wrong.append(scaled)
    if wrong:
        raise UserError(f"{file}: {', '.join(wrong)}; only {LAYOUT}, first or second, can be read")
    context = next((key for key in CONTEXTS if config.get(key) is not None), CONTEXTS[0])
    config = {**ABSENT, **config}
    heads = _number(file, config, "num_attention_heads")
    fields = {
        "width": _number(file, config, "hidden_size"),
        "heads": heads,
        "kv_heads": heads
        if config.get("num_key_value_heads") is None
        else _number(file, config, "num_key_value_heads"),
        "norm_eps": _number(file, config, "rms_norm_eps", float),
        "rope_base": _number(file, {"rope_theta": base}, "rope_theta", float),
        "context": ABSENT[context] if config.get(context) is None else _number(file, config, context),
    }
    for key, name in SIZES.items():
        if config.get(key) is not None:
            fields[name] = _number(file, config, key)
    width = fields["width"]
    if (
        config.get("head_dim") is not None
        and width % heads == 0
        and _number(file, config, "head_dim") != width // heads
    ):
        raise UserError(
            f"{file}: head_dim={config['head_dim']!r}, but {heads} heads share a width of {width}; only "
            f"{LAYOUT}, first or second, can be read"
        )
    return fields


SIZES = {"num_hidden_layers": "layers", "intermediate_size": "mlp_dim", "vocab_size": "vocab_size"}
SHOWN = ("width", "kv_heads", *SIZES.values())  # fields that the shapes of the weights show, too


def _rope(config: Mapping[str, Any]) -> tuple[str, Any]:
    """How RoPE is scaled ("" where it is not), and its base, from config.json of any age."""
    base = config.get("rope_theta")
    for key in ("rope_parameters", "rope_scaling"):
        rope = config.get(key)
        if rope is None:
            continue
        if not isinstance(rope, dict):
            return f"{key}={rope!r} (expected None)", base
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind not in ("default", None) and not (kind == "linear" and rope.get("factor") == 1):
            return f"{key}={rope!r} (expected rope_type 'default')", base
        base = rope.get("rope_theta", base)
    return "", 10000.0 if base is None else base


def _number(file: Path, config: Mapping[str, Any], key: str, kind: type = int) -> Any:
    """A number above 0, whole or not, of a config; UserError otherwise."""
    value: Any = config.get(key)
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")
    if not is_number or (kind is int and value != int(value)):
        whole = "whole number" if kind is int else "number"
        raise UserError(f"{file}: {key} is missing or not a {whole} above 0 ({value!r}); expected a LLaMA's config")
    return kind(value)


class MetaTensors(Tensors):
    """Meta's model-parallel shards as whole tensors under Hugging Face's names.

    Meta's RoPE rotates neighbours (2i, 2i + 1); Hugging Face's and ours rotate halves (i, i + H/2). The rows of q and k
    are reordered accordingly.
    """

    def __init__(self, folder: Path):
        self.path = folder
        self.files = tuple(sorted(file for file in folder.iterdir() if META_FILES.fullmatch(file.name)))
        if not self.files:
            raise UserError(f"{folder}: holds no consolidated.00.pth; expected Meta's files beside {PARAMS}")
        self.fields = self._fields(folder / PARAMS)
        self._shards = [TensorFile(file) for file in self.files]
        self.shapes, self.dtypes, self.others, self._origin = {}, {}, {}, {}
        for name in dict.fromkeys(name for shard in self._shards for name in (*shard, *shard.others)):
            if META_UNUSED.fullmatch(name):
                continue
            pattern = re.sub(r"(?<=layers\.)\d+(?=\.)", "{}", name)
            absent = [shard.path.name for shard in self._shards if name not in shard]
            if pattern not in META or absent:
                self.others[name] = f"absent from {', '.join(absent)}" if absent else "not a key of Meta's LLaMA"
                continue
            theirs, axis = META[pattern]
            ours = theirs.format(*re.findall(r"layers\.(\d+)\.", name))
            shapes = [shard.shapes[name] for shard in self._shards]
            if len(set(shapes)) > 1 or len({str(shard.dtypes[name]) for shard in self._shards}) > 1:
                self.others[name] = f"{shapes} in its shards, expected the same shape and dtype in all"
                continue
            if axis is not None and len(shapes[0]) <= axis:
                self.others[name] = f"{shapes[0]}, expected a matrix"
                continue
            shape = list(shapes[0])
            if axis is not None:
                shape[axis] *= len(shapes)
            self.shapes[ours], self.dtypes[ours] = tuple(shape), self._shards[0].dtypes[name]
            self._origin[ours] = (name, axis)

    def _fields(self, file: Path) -> dict[str, Any]:
        params = read_json_object(file, f"Meta's {PARAMS}")
        if params.get("use_scaled_rope"):
            raise UserError(f"{file}: use_scaled_rope=True; only {LAYOUT}, first or second, can be read")
        heads = _number(file, params, "n_heads")
        fields = {
            "width": _number(file, params, "dim"),
            "heads": heads,
            "kv_heads": heads if params.get("n_kv_heads") is None else _number(file, params, "n_kv_heads"),
            "norm_eps": _number(file, params, "norm_eps", float),
            "rope_base": 10000.0 if params.get("rope_theta") is None else _number(file, params, "rope_theta", float),
            # Not in the files; the first LLaMA was trained on 2048 positions, the second on 4096.
            "context": 2048,
        }
        if params.get("n_layers") is not None:
            fields["layers"] = _number(file, params, "n_layers")
        return fields

    def __getitem__(self, name: str) -> np.ndarray:
        origin, axis = self._origin[name]
        if axis is None or len(self._shards) == 1:
            whole = self._shards[0][origin]
        else:
            whole = np.concatenate([shard[origin] for shard in self._shards], axis=axis)
        for kernel, heads in (("q_proj.weight", "heads"), ("k_proj.weight", "kv_heads")):
            if name.endswith(kernel):
                return _halves(whole, self.fields[heads])
        return whole


def _halves(kernel: np.ndarray, heads: int) -> np.ndarray:
    """[heads * H, D]: reorders rows in every head from rotated pairs side by side to first halves before second."""
    rows, width = kernel.shape
    return kernel.reshape(heads, rows // heads // 2, 2, width).swapaxes(1, 2).reshape(rows, width)


def describe(config: Mapping[str, Any]) -> dict[str, Any]:
    """Hugging Face's config.json for the fields `config` of `config.model.llama`."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": config["width"],
        "intermediate_size": config["mlp_dim"],
        "num_attention_heads": config["heads"],
        "num_key_value_heads": config.get("kv_heads") or config["heads"],
        "num_hidden_layers": config["layers"],
        "vocab_size": config["vocab_size"],
        "max_position_embeddings": config["context"],
        "rms_norm_eps": config["norm_eps"],
        "rope_theta": config["rope_base"],
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
