"""All kinds of documents in one run: pairs, two sets of web pages, clips, storyboards; from scratch, on a laptop.

launch/mixture.sh                # gets the data, prepares them, shows them, trains
emu-jax train --config configs/mixture.py --workdir runs/mixture
emu-jax train --config configs/mixture.py:FOLDER/data --workdir FOLDER        # after launch/mixture.sh FOLDER

README, "Data at scale", says where the data come from. 300 steps; the losses of every source fall.
"""

from ml_collections import ConfigDict

from configs import models


def get_config(folder: str = "runs/mixture/data") -> ConfigDict:
    """`mini` on the five prepared folders in `folder`, weighted as the paper weighted its five."""
    model = models.mini()
    model.llama.update({"vocab_size": 0, "context": 2048})  # the tokenizer's vocabulary
    return ConfigDict(
        {
            "objective": "pretrain",
            "model": model,
            "init": {"emu": "", "llama": "", "vision": ""},
            "tokenizer": {"path": "", "vocab_size": 4000, "model_type": "bpe"},
            "data": {
                "source": "",
                "split": "train",
                "seed": 0,
                "row_tokens": 2048,
                "row_images": 13,
                "batch_rows": 2,
                "packing_window": 512,
                "shards": 1,
                "workers": 0,
                "max_faults": 0.02,
                "mixture": {
                    "fluent": source(f"{folder}/fluent", 128),
                    "gimp": source(f"{folder}/gimp", 128, subsequences=True),
                    "sklearn": source(f"{folder}/sklearn", 64, subsequences=True),
                    "animations": source(f"{folder}/animations", 16),
                    "bunny": source(f"{folder}/bunny", 16),
                },
                "pairs": {
                    "order": "random",
                    "image_first_probability": 0.5,
                    "text_first_probability": 0.5,
                    "text_first_text_weight": 1.0,
                    "image_first_visual_weight": 1.0,
                },
            },
            "optimizer": {
                "learning_rate": {"vision": 1.2e-3, "causal": 1.2e-3, "llama": 1.2e-3},
                "b1": 0.9,
                "b2": 0.98,
                "eps": 1e-8,
                "weight_decay": 0.05,
                "clip_norm": 1.0,
                "warmup_fraction": 0.1,
                "final_fraction": 0.02,
                "accumulate_steps": 1,
            },
            "train": {
                "steps": 300,
                "minutes": 0.0,
                "seed": 0,
                "log_every": 5,
                "checkpoint_every": 300,
                "keep_checkpoints": 1,
                "mesh": {"slice": 1, "data": 1, "fsdp": -1, "tensor": 1, "context": 1},
            },
        }
    )


def source(folder: str, weight: float, subsequences: bool = False) -> dict:
    """A folder of `emu-jax prepare`, read for ever."""
    return {"source": folder, "split": "train", "weight": weight, "epochs": 0, "subsequences": subsequences}
