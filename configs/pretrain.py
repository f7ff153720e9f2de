"""Pretraining as in the paper: from LLaMA and EVA-CLIP, with a fresh Causal Transformer and new token rows.

emu-jax convert --from LLaMA-13B                        --to weights/llama
emu-jax convert --from EVA01_CLIP_g_14_plus_psz14_s11B.pt --to weights/vision
emu-jax prepare pairs --in laion-coco --out data/laion_coco       # and the other four sources: docs/data-formats.md
emu-jax train --config configs/pretrain.py:14b --workdir runs/emu --config.tokenizer.path=LLaMA-13B/tokenizer.model \
    --config.data.mixture.laion_coco.source=data/laion_coco …       # or only --config.data.source=mine.jsonl

It is the same run on every slice: micro-batches, mesh and remat follow from the chips at hand (`train.fits`), and the
batch is 1,024 rows on all of them. `emu-jax plan` shows what it takes on chips that you do not have.

The paper's 10,000 steps took about 2 days on 128 A100-80G. To continue from the published Emu instead, set
`--config.init.emu=weights/emu --config.init.llama= --config.init.vision=`. Values marked [N] come from one set of notes
on the paper; values marked [I] are inferred.
"""

from ml_collections import ConfigDict

from configs import models
from emu_jax.config import choose


def source(weight: float, subsequences: bool = False) -> dict:
    """A folder of `emu-jax prepare`, set by `--config.data.mixture.<name>.source=…`; weight 0 leaves it out."""
    return {"source": "", "split": "train", "weight": float(weight), "epochs": 0, "subsequences": subsequences}


def pretrain_14b() -> ConfigDict:
    """The published sizes, 14.2 B parameters."""
    model = models.emu_14b()
    model.llama.vocab_size = 0  # the tokenizer's 32,000 and [PAD], [IMG], [/IMG], <image>
    return ConfigDict(
        {
            "objective": "pretrain",
            "model": model,
            "init": {
                "emu": "",
                "llama": "weights/llama",
                "vision": "weights/vision",
                "encoder": "",
                "codebook": "",
            },
            "tokenizer": {"path": "", "vocab_size": 32_000, "model_type": "bpe", "also": ()},
            "data": {
                "source": "",  # a single source instead of the mixture: a prepared folder or a JSONL of documents
                "split": "train",
                "seed": 0,
                "row_tokens": 2048,
                # As many as the paper's mixture has in 2,048 tokens (tests/benchmarks/benchmark_packing.py).
                # `emu-jax inspect-data` shows what fits your data; 0 measures it.
                "row_images": 21,
                # The paper's 82 M samples in 10,000 steps [N] are 8,200 a step. At the sizes of documents that
                # tests/benchmarks/benchmark_packing.py assumes, a row holds 8.5 of them: 965 rows, here 1,024.
                "batch_rows": 1024,
                "packing_window": 1024,
                "shards": 0,  # as many as devices hold rows, so that each record is read by one host
                "workers": 1,
                "max_faults": 0.02,
                "batch_samples": 0,
                "max_padding": 0.2,
                "predicted_share": 1.0,  # every image is read and predicted
                "chat_cut": "turn",
                "image_fingerprint": "stat",
                "video_frames": 8,
                "frame_sampling": "random",  # [M]; the reference's fixed rule is known for inference only
                # The paper's batch sizes [N]. `emu-jax prepare` chose MMC4's images by similarity.
                "mixture_unit": "samples",
                "mixture": {
                    "laion_2b": source(128),
                    "laion_coco": source(128),
                    "mmc4": source(64, subsequences=True),
                    "webvid": source(16),
                    "storyboard": source(16),
                },
                # The image comes before or after its text at random, p = 0.5 [I].
                "pairs": {
                    "order": "random",
                    "image_first_probability": 0.5,
                    "text_first_probability": 0.5,
                    "text_first_text_weight": 1.0,
                    "image_first_visual_weight": 1.0,
                },
            },
            "optimizer": {
                "learning_rate": {"vision": 4e-5, "causal": 1e-4, "llama": 3e-5},
                "b1": 0.9,
                "b2": 0.98,
                "eps": 1e-6,
                "weight_decay": 0.05,
                "clip_norm": 5.0,  # not published; Emu2's
                "skip_spikes": 0.0,
                "warmup_fraction": 0.2,  # [N]
                "final_fraction": 0.0,  # [I]
                "accumulate_steps": 0,  # by `train.fits`
                "ema_decay": 0.0,
                "groups": (),
            },
            # Losses of held-out data every so many steps: a split that every source has, or sources of their own.
            "eval": {"every": 0, "source": "", "split": "", "mixture": {}, "batches": 8, "best": "", "patience": 0},
            "train": {
                "steps": 10_000,
                "minutes": 0.0,
                "seed": 0,
                "log_every": 10,
                "checkpoint_every": 500,
                "checkpoint_minutes": 30.0,
                "keep_checkpoints": 2,
                "keep_every": 0,
                "save_timeout_minutes": 60.0,
                "max_bad_steps": 10,
                "mesh": {"slice": 0, "data": -1, "fsdp": 0, "tensor": 1, "context": 1},  # 0: by `fits`
                # What fits a device: v5e and v5p are compiled, the others chosen by their memory alone. FSDP over 16
                # chips takes 11 of 95 GB on v5p; over part of a torus the compiler all-gathers parameters, over a whole
                # torus it sums them, at twice the traffic.
                "fits": {
                    "v4": {"rows": 1, "fsdp": 32, "vision": "full", "causal": "full", "llama": "dots"},
                    "v5e": {"rows": 1, "fsdp": 128, "vision": "full", "causal": "full", "llama": "dots"},
                    "v5p": {"rows": 4, "fsdp": 16, "vision": "full", "causal": "full", "llama": "dots"},
                    "v6e": {"rows": 2, "fsdp": 64, "vision": "full", "causal": "full", "llama": "dots"},
                    "tpu7x": {"rows": 4, "fsdp": 16, "vision": "full", "causal": "full", "llama": "dots"},
                },
                "tuned": False,  # True: steps are 1 to 2% faster on v5p and v5e, compiling takes minutes (compiler.py)
            },
        }
    )


def pretrain_7b() -> ConfigDict:
    """LLaMA-7B in place of 13B: the paper's ablations [N]."""
    config = pretrain_14b()
    config.model = models.emu_7b()
    config.model.llama.vocab_size = 0
    return config


VARIANTS = {"14b": pretrain_14b, "7b": pretrain_7b}


def get_config(variant: str = "14b") -> ConfigDict:
    """One of `VARIANTS`."""
    return choose(VARIANTS, variant, __file__)
