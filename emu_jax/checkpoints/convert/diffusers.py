"""Diffusers folders (U-Net, VAE, scheduler, safety checker) <-> our configs and parameters.

    folder/config.json + diffusion_pytorch_model.safetensors -> a `Conversion`, with the sizes in its config
    (or .bin, .fp16.safetensors, shards)

Our modules have the files' names, so a key is a module path and a leaf: `….conv1.weight` is `…/conv1/kernel`.
Exceptions are listed in `RENAMED`. Every key is used exactly once, every parameter is assigned exactly once, and
everything that does not fit is reported together.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from emu_jax.checkpoints.convert.conversion import Assignment, Conversion, source_dtypes, unreadable
from emu_jax.checkpoints.convert.matching import Fault, report
from emu_jax.checkpoints.convert.tensor_files import Tensors, open_tensors
from emu_jax.checkpoints.layout import SCHEDULER
from emu_jax.errors import UserError
from emu_jax.models import clip, unet, vae
from emu_jax.models.diffusion import Schedule
from emu_jax.models.paths import flatten
from emu_jax.storage import read_json_object

WEIGHTS = (
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.bin",
    "model.safetensors",
    "pytorch_model.bin",
)
LAYOUT = "the diffusers layout of Stable Diffusion 1.5"

# (file's module path, ours): regular expressions over dotted paths, applied in order. The first four are names of VAE
# attentions before diffusers 0.15.
RENAMED: tuple[tuple[str, str], ...] = (
    (r"\.query$", ".to_q"),
    (r"\.key$", ".to_k"),
    (r"\.value$", ".to_v"),
    (r"\.proj_attn$", ".to_out"),
    (r"\.to_out\.0$", ".to_out"),
    (r"\.transformer_blocks\.0\.", ".block."),
    (r"\.ff\.net\.0\.proj$", ".ff.proj"),
    (r"\.ff\.net\.2$", ".ff.out"),
    # The safety checker wraps CLIP's vision tower twice.
    (r"^vision_model(\.vision_model)?\.", "vision."),
    (r"\.encoder\.layers\.", ".layers."),
    (r"\.pre_layrnorm$", ".pre_norm"),
    (r"\.post_layernorm$", ".post_norm"),
)
# Keys of the safety checker that are not a module's weight or bias.
RENAMED_KEYS = {
    "embeddings.patch_embedding.weight": "patch_kernel",
    "embeddings.position_embedding.weight": "position_embedding",
    "embeddings.class_embedding": "class_embedding",
}
UNUSED = re.compile(r"\.position_ids$")  # a range, in older files

# The architecture is fixed except for sizes: config key -> the values that it may have, if it is present.
FIXED_UNET = {
    "act_fn": ("silu",),
    "center_input_sample": (False,),
    "class_embed_type": (None,),
    "addition_embed_type": (None,),
    "encoder_hid_dim": (None,),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "dual_cross_attention": (False,),
    "only_cross_attention": (False,),
    "time_embedding_type": ("positional",),
    "resnet_time_scale_shift": ("default",),
    "transformer_layers_per_block": (1,),
    "downsample_padding": (1,),
    "mid_block_scale_factor": (1,),
    "dropout": (0.0, 0),
    "num_attention_heads": (None,),
    "num_class_embeds": (None,),
    "attention_type": ("default",),
    "resnet_out_scale_factor": (1.0,),
    "resnet_skip_time_act": (False,),
    "time_embedding_act_fn": (None,),
    "timestep_post_act": (None,),
    "time_cond_proj_dim": (None,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
}
FIXED_VAE = {
    "act_fn": ("silu",),
    "in_channels": (3,),
    "out_channels": (3,),
    "shift_factor": (None,),
    "latents_mean": (None,),
    "latents_std": (None,),
    "mid_block_add_attention": (True,),
    "use_quant_conv": (True,),
    "use_post_quant_conv": (True,),
}
FIXED_SCHEDULER = {
    "beta_schedule": ("scaled_linear",),
    "prediction_type": ("epsilon",),
    "set_alpha_to_one": (False,),
    "skip_prk_steps": (True,),
    "timestep_spacing": ("leading",),
    "trained_betas": (None, []),
    "clip_sample": (False,),
    "rescale_betas_zero_snr": (False,),
    "thresholding": (False,),
}
DDIM_ONLY = ("clip_sample", "rescale_betas_zero_snr", "thresholding")


# Keys that may hold one value for every block.
ONE_FOR_ALL = {"only_cross_attention", "transformer_layers_per_block", "layers_per_block", "attention_head_dim"}
WHOLE, NUMBER = "a whole number above 0", "a number above 0"
SIZES = {
    **dict.fromkeys(("in_channels", "latent_channels", "layers_per_block", "norm_num_groups"), WHOLE),
    **dict.fromkeys(("attention_head_dim", "cross_attention_dim", "num_train_timesteps"), WHOLE),
    **dict.fromkeys(("norm_eps", "beta_start", "beta_end"), NUMBER),
    "block_out_channels": "a list of whole numbers above 0",
    "down_block_types": "a list of names",
    "up_block_types": "a list of names",
}
NEEDED_VAE = ("block_out_channels", "latent_channels", "layers_per_block", "norm_num_groups")
NEEDED_UNET = (
    "in_channels",
    "block_out_channels",
    "down_block_types",
    "up_block_types",
    "layers_per_block",
    "attention_head_dim",
    "cross_attention_dim",
    "norm_num_groups",
    "norm_eps",
)
NEEDED_SCHEDULER = ("num_train_timesteps", "beta_start", "beta_end")


def read_config(folder: Path, name: str, fixed: Mapping[str, tuple], needed: Sequence[str] = ()) -> dict[str, Any]:
    """A diffusers folder's JSON; UserError if it asks for another architecture than Stable Diffusion 1.5's.

    A list that repeats one value for every block, as some files have it, becomes the value.
    """
    file = folder / name
    config = read_json_object(file, LAYOUT)
    for key in ONE_FOR_ALL & config.keys():
        value = config[key]
        if isinstance(value, list) and value and all(each == value[0] for each in value):
            config[key] = value[0]
    wrong = [
        f"{key}={config[key]!r} (expected {values[0]!r})"
        for key, values in fixed.items()
        if key in config and config[key] not in values
    ]
    wrong += [f"{key} is missing" for key in needed if config.get(key) is None]
    wrong += [f"{key}={config[key]!r} (expected {SIZES[key]})" for key in needed if not _is_size(key, config.get(key))]
    if wrong:
        raise UserError(f"{file}: {', '.join(wrong)}; only {LAYOUT} can be read")
    return config


def _is_size(key: str, value: Any) -> bool:
    """Whether a size is as `SIZES` says, or absent."""

    def is_number(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")

    def is_whole(value: Any) -> bool:
        return is_number(value) and isinstance(value, int)

    if value is None:
        return True
    if key.endswith("_types"):
        return isinstance(value, list) and bool(value) and all(isinstance(each, str) for each in value)
    if key == "block_out_channels":
        return isinstance(value, list) and bool(value) and all(map(is_whole, value))
    return is_number(value) if SIZES[key] == NUMBER else is_whole(value)


def unet_config(folder: Path) -> dict[str, Any]:
    """`config.unet` from a folder's config.json."""
    config = read_config(folder, "config.json", FIXED_UNET, NEEDED_UNET)
    down, up = config["down_block_types"], config["up_block_types"]
    transformers = [kind == "CrossAttnDownBlock2D" for kind in down]
    known = {"CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"}
    if not {*down, *up} <= known or [kind == "CrossAttnUpBlock2D" for kind in reversed(up)] != transformers:
        raise UserError(f"{folder / 'config.json'}: blocks {down} and {up}; expected {LAYOUT}")
    return {
        "latent_channels": config["in_channels"],
        "block_channels": list(config["block_out_channels"]),
        "attention_blocks": transformers,
        "layers_per_block": config["layers_per_block"],
        "heads": config["attention_head_dim"],  # the published files' name for the number of heads
        "condition_dim": config["cross_attention_dim"],
        "groups": config["norm_num_groups"],
        "norm_eps": config["norm_eps"],
    }


def vae_config(folder: Path) -> dict[str, Any]:
    """`config.vae` from a folder's config.json."""
    config = read_config(folder, "config.json", FIXED_VAE, NEEDED_VAE)
    return {
        "block_channels": list(config["block_out_channels"]),
        "latent_channels": config["latent_channels"],
        "layers_per_block": config["layers_per_block"],
        "groups": config["norm_num_groups"],
        "scale": _optional(folder / "config.json", config, "scaling_factor", 0.18215),  # absent from older files
    }


def sample_size(folder: Path) -> int:
    """Height and width of the latents that the U-Net was trained on."""
    config = read_config(folder, "config.json", FIXED_UNET)
    return int(_optional(folder / "config.json", config, "sample_size", 64))


def _optional(file: Path, config: Mapping[str, Any], key: str, default: float) -> float:
    """A number that older files do not have."""
    value = config.get(key)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not value > 0):
        raise UserError(f"{file}: {key}={value!r}; expected {NUMBER}")
    return default if value is None else value


def load_schedule(folder: Path) -> Schedule:
    """The noise schedule of a folder with scheduler_config.json."""
    config = read_config(folder, "scheduler_config.json", FIXED_SCHEDULER, NEEDED_SCHEDULER)
    return Schedule(
        train_steps=config["num_train_timesteps"],
        beta_start=config["beta_start"],
        beta_end=config["beta_end"],
        offset=config.get("steps_offset") or 0,
    )


def unet_conversion(folder: Path) -> Conversion:
    """Converts a folder's U-Net, with the schedule of `scheduler` beside it; UserError lists what does not fit."""
    fields = unet_config(folder)
    config = {
        "latent_size": sample_size(folder),
        "queries": 0,  # the files do not say how many embeddings per image the U-Net was trained on
        "unet": fields,
        "schedule": dataclasses.asdict(load_schedule(folder.parent / SCHEDULER)),
    }
    sizes = unet.UNetConfig.from_dict(fields)
    return _conversion(folder, "unet", unet.abstract(sizes), unet.logical_axes(sizes), config)


def vae_conversion(folder: Path) -> Conversion:
    """Converts a folder's VAE; UserError lists what does not fit."""
    fields = vae_config(folder)
    sizes = vae.VAEConfig.from_dict(fields)
    return _conversion(folder, "vae", vae.abstract(sizes), vae.logical_axes(sizes), {"image_size": 0, "vae": fields})


def safety_checker_conversion(folder: Path) -> Conversion:
    """Converts a `safety_checker` folder; sizes are inferred from the shapes. UserError lists what does not fit."""
    vision = read_config(folder, "config.json", {}).get("vision_config") or {}
    file = _weights(folder)
    shapes = {our_path(key): shape for key, shape in file.shapes.items()}
    try:
        patch, _, _, width = to_ours("kernel", np.broadcast_to(np.float32(0), shapes["vision/patch_kernel"]), 4).shape
        sizes = clip.ClipConfig(
            image_size=patch * round((shapes["vision/position_embedding"][0] - 1) ** 0.5),
            patch_size=patch,
            width=width,
            layers=len({path.split("/")[2] for path in shapes if path.startswith("vision/layers/")}),
            heads=vision.get("num_attention_heads", width // 64),
            mlp_dim=shapes["vision/layers/0/mlp/fc1/kernel"][0],
            embedding_dim=shapes["visual_projection/kernel"][0],
            concepts=shapes["concept_embeds"][0],
            special_concepts=shapes["special_care_embeds"][0],
            norm_eps=vision.get("layer_norm_eps", 1e-5),
        )
    except KeyError as error:
        raise UserError(f"{file.path}: holds no {error.args[0]}; expected Stable Diffusion's safety checker") from error
    config = {"safety_checker": dataclasses.asdict(sizes)}
    return _conversion(folder, "safety_checker", clip.abstract(sizes), {}, config)


def our_path(key: str) -> str:
    """`down_blocks.0.resnets.1.conv1.weight` -> `down_blocks/0/resnets/1/conv1/kernel`; unknown keys likewise."""
    for theirs, ours in RENAMED_KEYS.items():
        if key.endswith(theirs):
            return f"vision/{ours}"
    module, _, leaf = key.rpartition(".")
    for pattern, replacement in RENAMED:
        module = re.sub(pattern, replacement, module)
    last = module.rpartition(".")[2]
    if leaf == "weight":
        leaf = "scale" if "norm" in last else "kernel"
    return f"{module}.{leaf}".lstrip(".").replace(".", "/")


def match(
    shapes: Mapping[str, tuple[int, ...]], target: Mapping[str, Any], where: str, faults: Sequence[Fault] = ()
) -> dict[str, str]:
    """Our path -> file's key, for every parameter of `target`; reads no data.

    Args:
      faults: found earlier, to be reported together with those found here.

    Raises:
      UserError: a key is unknown, repeated or misshapen, or a parameter has none; lists all of them.
    """
    wanted = {path: tuple(leaf.shape) for path, leaf in flatten(target).items()}
    found: dict[str, str] = {}
    faults = list(faults)
    for key, shape in shapes.items():
        if UNUSED.search(key):
            continue
        path = our_path(key)
        if path not in wanted:
            faults.append(Fault("unknown", key))
        elif path in found:
            faults.append(Fault("repeated", key, f"the same parameter as {found[path]}"))
        else:
            found[path] = key
            if _our_shape(path, tuple(shape), wanted[path]) != wanted[path]:
                faults.append(Fault("misshapen", key, f"{tuple(shape)}, expected {wanted[path]} as {path}"))
    faults += [Fault("missing", path) for path in wanted if path not in found]
    if faults:
        raise UserError(report(where, faults, LAYOUT))
    return found


def _our_shape(path: str, shape: tuple[int, ...], wanted: tuple[int, ...]) -> tuple[int, ...]:
    return to_ours(path, np.broadcast_to(np.float32(0), shape), len(wanted)).shape


def to_ours(path: str, value: np.ndarray, rank: int) -> np.ndarray:
    """PyTorch's kernels [O, I] or [O, I, h, w] -> our [I, O] or [h, w, I, O]; a 1x1 convolution may be our matrix.

    Embeddings and all other parameters stay as they are.
    """
    if not path.endswith("kernel"):
        return value
    if value.ndim == 4 and rank == 2 and value.shape[2:] == (1, 1):
        value = value[..., 0, 0]
    return value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T


def to_theirs(path: str, value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The inverse of `to_ours`, in the file's `shape` (our matrix may be a 1x1 convolution there)."""
    if not path.endswith("kernel"):
        return value
    return (value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T).reshape(shape)


# The inverse of `RENAMED`, with diffusers' current names.
THEIR_NAMES: tuple[tuple[str, str], ...] = (
    (r"\.block\.", ".transformer_blocks.0."),
    (r"\.ff\.proj$", ".ff.net.0.proj"),
    (r"\.ff\.out$", ".ff.net.2"),
    (r"\.to_out$", ".to_out.0"),
)
CONVOLUTIONS = re.compile(r"(^|/)(proj_in|proj_out|quant_conv|post_quant_conv)/kernel$")  # 1x1; our matrices


def their_key(path: str) -> str:
    """`…/conv1/kernel` -> `….conv1.weight`, in diffusers' current names; the inverse of `our_path`."""
    module, _, leaf = path.replace("/", ".").rpartition(".")
    for pattern, replacement in THEIR_NAMES:
        module = re.sub(pattern, replacement, module)
    return f"{module}.{'weight' if leaf in ('kernel', 'scale') else leaf}"


def their_shape(path: str, ours: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in a file of our parameter at `path`."""
    if not path.endswith("kernel"):
        return ours
    if len(ours) == 4:
        return ours[3], ours[2], *ours[:2]
    return (*ours[::-1], 1, 1) if CONVOLUTIONS.search(path) else ours[::-1]


def describe_unet(config: unet.UNetConfig, latent_size: int) -> dict[str, Any]:
    """Diffusers' config.json for a U-Net."""
    down = ["CrossAttnDownBlock2D" if has else "DownBlock2D" for has in config.attention_blocks]
    up = ["CrossAttnUpBlock2D" if has else "UpBlock2D" for has in reversed(config.attention_blocks)]
    return {
        "_class_name": "UNet2DConditionModel",
        **{key: values[0] for key, values in FIXED_UNET.items()},
        "sample_size": latent_size,
        "in_channels": config.latent_channels,
        "out_channels": config.latent_channels,
        "block_out_channels": list(config.block_channels),
        "down_block_types": down,
        "up_block_types": up,
        "layers_per_block": config.layers_per_block,
        "attention_head_dim": config.heads,
        "cross_attention_dim": config.condition_dim,
        "norm_num_groups": config.groups,
        "norm_eps": config.norm_eps,
    }


def describe_vae(fields: Mapping[str, Any], image_size: int) -> dict[str, Any]:
    """Diffusers' config.json for the fields of `config.vae`."""
    count = len(fields["block_channels"])
    return {
        "_class_name": "AutoencoderKL",
        **{key: values[0] for key, values in FIXED_VAE.items()},
        "sample_size": image_size or 512,
        "block_out_channels": list(fields["block_channels"]),
        "down_block_types": ["DownEncoderBlock2D"] * count,
        "up_block_types": ["UpDecoderBlock2D"] * count,
        "layers_per_block": fields["layers_per_block"],
        "latent_channels": fields["latent_channels"],
        "norm_num_groups": fields["groups"],
        "scaling_factor": fields["scale"],
    }


def describe_schedule(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Diffusers' scheduler_config.json for the fields of `config.schedule`."""
    return {
        "_class_name": "PNDMScheduler",
        **{key: values[0] for key, values in FIXED_SCHEDULER.items() if key not in DDIM_ONLY},
        "num_train_timesteps": fields["train_steps"],
        "beta_start": fields["beta_start"],
        "beta_end": fields["beta_end"],
        "steps_offset": fields["offset"],
    }


def _weights(folder: Path) -> Tensors:
    return open_tensors(folder, WEIGHTS, f"{', '.join(WEIGHTS[:-1])} or {WEIGHTS[-1]}, whole or in shards")


def _conversion(
    folder: Path, holds: str, target: Mapping[str, Any], logical: Mapping[str, Any], config: dict[str, Any]
) -> Conversion:
    """Assigns the leaves `params/<holds>/…` from a folder's files."""
    tensors = _weights(folder)
    faults = [fault for fault in unreadable(tensors) if not UNUSED.search(fault.name)]
    keys = match(tensors.shapes, target, str(tensors.path), faults)
    flat = flatten(target)
    assignments = tuple(
        Assignment(
            f"params/{holds}/{path}", None, (keys[path],), functools.partial(to_ours, path, rank=len(leaf.shape))
        )
        for path, leaf in flat.items()
    )
    shapes = {f"params/{holds}/{path}": tuple(leaf.shape) for path, leaf in flat.items()}
    axes = {f"params/{holds}/{path}": names for path, names in flatten(logical).items()}
    about = {
        "format": "diffusers",
        "keys": keys,
        "shapes": {key: list(tensors.shapes[key]) for key in keys.values()},
        "dtypes": source_dtypes(tensors, {key: key for key in keys.values()}),
    }
    return Conversion(tensors, holds, config, shapes, assignments, axes=axes, about=about)
