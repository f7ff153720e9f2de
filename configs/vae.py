"""A small VAE from scratch, for use without Stable Diffusion weights: 64 x 64 images to 8 x 8 latents.

emu-jax train --config configs/vae.py --workdir runs/quickstart/vae

By estimate 3 minutes on 2 CPU cores.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """A narrow version of Stable Diffusion's VAE.

    Eight latent channels give sharper images, but a U-Net learns them more slowly.
    """
    return ConfigDict(
        {
            "objective": "vae",
            "image_size": 64,
            "vae": {
                "block_channels": (16, 16, 32, 64),
                "latent_channels": 4,
                "layers_per_block": 1,
                "groups": 8,
                "scale": 1.0,  # measured during training and used afterwards
            },
            "loss": {
                "squared_weight": 1.0,
                "kl_weight": 1e-3,
                "perceptual_weight": 0.0,
                "perceptual_blocks": 3,
                "perceptual_crop": 0,
            },
            "data": {
                "source": "fluent_emoji",
                "split": "train",
                "seed": 0,
                "batch": 8,
                "mixture": {},
                "max_faults": 0.0,
            },
            "optimizer": {
                "learning_rate": {"vae": 2e-3},
                "b1": 0.9,
                "b2": 0.99,
                "eps": 1e-8,
                "weight_decay": 0.0,
                "clip_norm": 1.0,
                "skip_spikes": 0.0,
                "warmup_fraction": 0.05,
                "final_fraction": 0.02,
                "accumulate_steps": 1,
                "ema_decay": 0.0,
                "groups": (),
            },
            # Losses of held-out data.
            "eval": {"every": 0, "source": "", "split": "", "mixture": {}, "batches": 8, "best": "", "patience": 0},
            "train": {
                "steps": 800,
                "minutes": 0.0,
                "seed": 0,
                "log_every": 20,
                "checkpoint_every": 500,
                "checkpoint_minutes": 0.0,
                "keep_checkpoints": 2,
                "keep_every": 0,
                "save_timeout_minutes": 60.0,
                "max_bad_steps": 10,
                "mesh": {"slice": 1, "data": 1, "fsdp": -1, "tensor": 1, "context": 1},
            },
        }
    )
