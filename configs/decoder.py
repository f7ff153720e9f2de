"""The visual decoder's U-Net, trained on embeddings of a frozen model; the VAE is frozen as well.

emu-jax precompute --model runs/quickstart --vae runs/quickstart/vae --out runs/quickstart/latents
emu-jax train --config configs/decoder.py --workdir runs/quickstart/unet --config.data.source=runs/quickstart/latents
emu-jax train --config configs/decoder.py:published …      # Stable Diffusion 1.5's size and the paper's schedule
"""

from ml_collections import ConfigDict


def get_config(variant: str = "mini") -> ConfigDict:
    """`mini`, for the quick start: 10 minutes on 2 CPU cores; or `published`."""
    return {"mini": mini, "published": published}[variant]()


def mini() -> ConfigDict:
    """2.8 M parameters over 8 x 8 latents; 2,800 steps.

    Expected scores of drawings of heldout_combinations, by pixels (three runs of 2,800 to 3,000 steps): the right role
    is among the 5 nearest images for 0.85 to 0.94, the nearest image has the right tone for 0.60 to 0.74. After 1,700
    steps they were 0.73 and 0.53.
    """
    return ConfigDict(
        {
            "objective": "decoder",
            "init": {"unet": ""},  # Stable Diffusion's U-Net, converted by `emu-jax convert`
            # A model and a VAE here make the examples while the U-Net trains; then data.source holds documents.
            "online": {"model": "", "vae": "", "image_size": 0, "fit": "crop", "min_side": 0},
            # Sizes of 0 are taken from the examples.
            "latent_size": 0,
            "queries": 0,
            "unet": {
                "latent_channels": 0,
                "block_channels": (64, 96),
                "attention_blocks": (True, True),
                "layers_per_block": 1,
                "heads": 4,
                "condition_dim": 0,
                "groups": 16,
                "remat": "none",
                "dtype": "float32",
            },
            "schedule": {"train_steps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "offset": 1},
            # A quarter of the conditions are the image's own embeddings, for reconstruction and blending.
            "loss": {"condition_drop": 0.1, "encoded_share": 0.25, "min_snr": 5.0},
            "data": {"source": "", "split": "train", "seed": 0, "batch": 32, "mixture": {}, "max_faults": 0.0},
            "optimizer": {
                "learning_rate": {"unet": 1.5e-3},
                "b1": 0.9,
                "b2": 0.99,
                "eps": 1e-8,
                "weight_decay": 1e-2,
                "clip_norm": 1.0,
                "skip_spikes": 0.0,
                "warmup_fraction": 0.03,
                "final_fraction": 0.02,
                "accumulate_steps": 1,
                "drops": (),
                "ema_decay": 0.997,  # averages over about 330 steps, as the runs above did at their end
                "groups": (),
            },
            # Losses of held-out data.
            "eval": {"every": 0, "source": "", "split": "", "mixture": {}, "batches": 8, "best": "", "patience": 0},
            "train": {
                "steps": 2800,
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


def published() -> ConfigDict:
    """Stable Diffusion 1.5's U-Net; 15,000 steps of 1,600 images at 512 x 512 ([N]: docs/paper.md)."""
    config = mini()
    config.init.unet = "weights/stable-diffusion/unet"
    config.unet.update(
        {
            "block_channels": (320, 640, 1280, 1280),
            "attention_blocks": (True, True, True, False),
            "layers_per_block": 2,
            "heads": 8,
            "groups": 32,
            "remat": "full",
            "dtype": "bfloat16",
        }
    )
    config.loss.update({"encoded_share": 0.0, "min_snr": 0.0})
    config.data.batch = 1600
    # Every chip holds the whole U-Net: with sharded kernels the TPU compiler runs for more than 15 minutes.
    config.train.mesh.update({"data": -1, "fsdp": 1})
    config.optimizer.update(
        {
            "learning_rate": {"unet": 1e-4},
            "b2": 0.999,
            # Warm-up to 1e-4 over 5,000 steps, then 5e-5 from step 10,000 and 1e-5 from step 14,000.
            "warmup_fraction": 5 / 15,
            "drops": ((10 / 15, 0.5), (14 / 15, 0.1)),
            "ema_decay": 0.9999,  # not published
        }
    )
    config.train.update({"steps": 15_000, "minutes": 0.0, "log_every": 50, "checkpoint_every": 1000})
    return config
