"""The quick start: a small Emu from scratch on the embedded images and their names.

emu-jax train --config configs/quickstart.py --workdir runs/quickstart
emu-jax evaluate --model runs/quickstart

2,000 steps take about 5 minutes on 2 slow CPU cores. emu-mini, the model in the box, has had more (`emu_mini.py`).
"""

from ml_collections import ConfigDict

from configs import models


def source(name: str, weight: float) -> dict:
    """An embedded source, repeated without end."""
    return {"source": name, "weight": float(weight), "epochs": 0}


def get_config() -> ConfigDict:
    """A model that captions images and generates embeddings; the module's docstring has times and scores."""
    model = models.mini()
    model.llama.vocab_size = 0  # taken from the tokenizer
    # Both losses share one clipped gradient: at weight 1, captions are learnt first and R2 stays below one half.
    model.regression_loss_weight = 4.0
    model.learn_image_token = True  # after a name on its own the model begins an image, after a caption it ends
    return ConfigDict(
        {
            "objective": "pretrain",
            "model": model,
            "init": {"emu": "", "llama": "", "vision": "", "encoder": "", "codebook": ""},
            "tokenizer": {"path": "", "vocab_size": 4000, "model_type": "word", "also": ("fluent_emoji_chats",)},
            "data": {
                "source": "",
                "split": "train",
                "seed": 0,
                "row_tokens": 96,
                "row_images": 0,  # measured: 4 for these captions
                "batch_rows": 8,
                "batch_samples": 0,
                "max_padding": 1.0,
                "packing_window": 256,
                "shards": 1,
                "workers": 0,
                "max_faults": 0.0,
                "image_fingerprint": "stat",
                "video_frames": 8,
                "frame_sampling": "random",
                # The questions have words that no name has, such as "yes": chats are tuned by adapters, which cannot
                # teach the model a word that it has never read.
                "mixture": {"images": source("fluent_emoji", 19), "questions": source("fluent_emoji_questions", 1)},
                "mixture_unit": "samples",
                # The images of half of the documents are predicted, those of the other half are read.
                "predicted_share": 0.5,
                "chat_cut": "turn",
                # Every image is captioned; half of them are also predicted from their caption, which teaches the
                # regression. In caption order too it would make the encoder's outputs predictable, not useful.
                "pairs": {
                    "order": "both",
                    "image_first_probability": 0.5,
                    "text_first_probability": 0.5,
                    "text_first_text_weight": 0.3,
                    "image_first_visual_weight": 0.0,
                },
            },
            "optimizer": {
                "learning_rate": {"vision": 1.2e-3, "causal": 1.2e-3, "llama": 1.2e-3},
                "b1": 0.9,
                "b2": 0.98,
                "eps": 1e-8,
                "weight_decay": 0.05,
                "clip_norm": 1.0,
                "skip_spikes": 0.0,
                "warmup_fraction": 0.03,
                "final_fraction": 0.02,
                "accumulate_steps": 1,
                "ema_decay": 0.0,
                "groups": (),
            },
            # The losses of images that training does not show, on the same 4 batches every time.
            "eval": {
                "every": 0,
                "source": "",
                "split": "heldout_combinations",
                "mixture": {},
                "batches": 4,
                "best": "",
                "patience": 0,
            },
            "train": {
                "steps": 2000,
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
