"""Sizes of the model: `debug` (tests), `micro` (ablations), `mini` (quick start), `7b` (the paper's ablations), `14b`
(published).

Each function returns the `model` group of a config. `emu-jax inspect --config configs/models.py:14b` prints the parts,
shapes and parameter counts.
"""

from ml_collections import ConfigDict

from emu_jax.config import choose
from emu_jax.models.emu import CLIP_MEAN, CLIP_STD


def emu_14b() -> ConfigDict:
    """The published Emu: EVA-CLIP-g (1.0 B), Causal Transformer (0.15 B), LLaMA-13B with a regression head (13 B)."""
    return ConfigDict(
        {
            "vision": {
                "image_size": 224,
                "patch_size": 14,
                "width": 1408,
                "layers": 40,
                "heads": 16,
                "mlp_dim": 6144,
                "norm_eps": 1e-6,
                "drop_path": 0.0,
                "remat": "auto",
            },
            "causal": {
                "kind": "causal",
                "queries": 32,
                "width": 768,
                "layers": 12,
                "heads": 12,
                "head_dim": 64,
                "mlp_dim": 3072,
                "buckets": 32,
                "max_distance": 128,
                "norm_eps": 1e-6,
                "dropout": 0.1,
                "remat": "auto",
            },
            "llama": {
                "vocab_size": 32004,
                "width": 5120,
                "layers": 40,
                "heads": 40,
                "kv_heads": 0,  # as many
                "mlp_dim": 13824,
                "norm_eps": 1e-6,
                "rope_base": 10000.0,
                "rope_dtype": "float32",
                "context": 2048,
                "quantised": "",
                "lora_rank": 0,
                "lora_alpha": 16.0,
                "lora_dropout": 0.0,
                "lora_targets": ("q", "k", "v", "o"),
                "attention": "auto",
                "remat": "auto",
            },
            "dtype": "bfloat16",
            "param_dtype": "float32",
            "init": "reference",
            "float32_gradients": False,
            "unroll": False,
            "loss_chunk": 256,
            "visual_head": {"name": "l2"},  # as published; docs/visual-heads.md has others and their settings
            # The weights of the two losses are not published; 1 : 1 is inferred.
            "text_loss_weight": 1.0,
            "regression_loss_weight": 1.0,
            "loss_mean": "tokens",
            "learn_image_token": False,  # as published: the model never learns when to begin an image
            "standardise": False,
            "stop_target_inputs": False,
            "input_noise": 0.0,
            "scheduled_sampling": 0.0,
            "pixel_mean": CLIP_MEAN,
            "pixel_std": CLIP_STD,
        }
    )


def emu_7b() -> ConfigDict:
    """The published model with LLaMA-7B instead of 13B; the paper's ablations ran on a 7B LLM (second-hand note)."""
    model = emu_14b()
    model.llama.update({"width": 4096, "layers": 32, "heads": 32, "mlp_dim": 11008})
    return model


def mini() -> ConfigDict:
    """2.3 M parameters that learn the embedded images on a laptop's CPU: 64 x 64 pixels, 8 queries."""
    model = emu_14b()
    model.vision.update({"image_size": 64, "patch_size": 16, "width": 128, "layers": 3, "heads": 4, "mlp_dim": 512})
    model.causal.update(
        {"queries": 8, "width": 128, "layers": 2, "heads": 4, "head_dim": 32, "mlp_dim": 512, "dropout": 0.0}
    )
    # `configs/quickstart.py` takes the vocabulary size from the tokenizer.
    model.llama.update({"vocab_size": 2004, "width": 128, "layers": 3, "heads": 4, "mlp_dim": 384, "context": 256})
    model.update({"dtype": "float32", "unroll": True, "loss_chunk": 48})
    for part in (model.vision, model.causal, model.llama):
        part.remat = "none"
    model.update({"init": "scaled", "standardise": True, "stop_target_inputs": True})
    return model


def micro() -> ConfigDict:
    """1.1 M parameters for many short runs: 32 x 32 pixels, 8 queries."""
    model = mini()
    model.vision.update({"image_size": 32, "patch_size": 8, "width": 96, "mlp_dim": 384})
    model.causal.update({"width": 96, "head_dim": 24, "mlp_dim": 384})
    model.llama.update({"width": 96, "mlp_dim": 256})
    return model


def debug() -> ConfigDict:
    """A few thousand parameters for tests, with every mechanism at its smallest."""
    model = mini()
    model.vision.update({"image_size": 16, "patch_size": 8, "width": 16, "layers": 2, "heads": 2, "mlp_dim": 24})
    model.causal.update({"queries": 4, "width": 16, "layers": 2, "heads": 2, "head_dim": 4, "mlp_dim": 24})
    model.llama.update({"vocab_size": 68, "width": 16, "layers": 2, "heads": 2, "mlp_dim": 24, "context": 128})
    model.update({"standardise": False, "stop_target_inputs": False, "unroll": False, "loss_chunk": 16})
    return model


SIZES = {"debug": debug, "micro": micro, "mini": mini, "7b": emu_7b, "14b": emu_14b}


def get_config(size: str = "mini") -> ConfigDict:
    """A config with only a model, for `emu-jax inspect`."""
    return ConfigDict({"model": choose(SIZES, size, __file__)})
