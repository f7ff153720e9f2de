"""All kinds of documents in one run on a laptop: pairs, two sets of web pages, video clips, storyboards.

launch/mixture.sh                # downloads and prepares the data, shows them, trains
emu-jax train --config configs/mixture.py --workdir runs/mixture
emu-jax train --config configs/mixture.py:FOLDER/data --workdir FOLDER        # after launch/mixture.sh FOLDER

docs/data.md describes the sets. 300 steps take 5 to 8 minutes on 2 quiet CPU cores. The text loss of every
source falls from about 7 to between 2.8 and 4.9, and its regression loss to less than half.
"""

from ml_collections import ConfigDict

from configs import quickstart


def get_config(folder: str = "runs/mixture/data") -> ConfigDict:
    """`mini` on the five prepared folders in `folder`, weighted as the paper weighted its five."""
    config = quickstart.get_config()
    config.model.llama.context = 2048
    config.model.regression_loss_weight = 1.0
    config.tokenizer.update({"model_type": "bpe", "also": ()})
    config.data.update({"source": "", "row_tokens": 2048, "batch_rows": 2, "packing_window": 512, "max_faults": 0.02})
    config.data.mixture = ConfigDict(
        {
            "fluent": source(f"{folder}/fluent", 128),
            "gimp": source(f"{folder}/gimp", 128, subsequences=True),
            "sklearn": source(f"{folder}/sklearn", 64, subsequences=True),
            "animations": source(f"{folder}/animations", 16),
            "bunny": source(f"{folder}/bunny", 16),
        }
    )
    config.data.pairs.update({"order": "random", "text_first_text_weight": 1.0, "image_first_visual_weight": 1.0})
    config.optimizer.warmup_fraction = 0.1
    config.train.update({"steps": 300, "minutes": 0.0, "log_every": 5, "checkpoint_every": 300, "keep_checkpoints": 1})
    return config


def source(folder: str, weight: float, subsequences: bool = False) -> dict:
    """A folder of `emu-jax prepare`, repeated without end."""
    return {"source": folder, "split": "train", "weight": float(weight), "epochs": 0, "subsequences": subsequences}
