"""The published recipe (`configs/pretrain.py:14b`) at widths that a CPU trains: 28 micro-batches of 8 rows a step."""

from ml_collections import ConfigDict

from configs import models, pretrain

STEPS = 3


def get_config() -> ConfigDict:
    config = pretrain.get_config()
    sizes = models.mini()
    for part in ("vision", "causal", "llama"):
        config.model[part].update(sizes[part])
    config.model.llama.vocab_size = 0
    config.model.update({"dtype": "float32", "unroll": True, "loss_chunk": 32})
    config.init.update({"llama": "", "vision": ""})
    config.tokenizer.vocab_size = 300
    config.data.mixture = ConfigDict()
    config.data.update({"row_tokens": 64, "row_images": 4, "batch_rows": 224, "packing_window": 64, "max_padding": 1.0})
    config.data.update({"shards": 2, "workers": 0})
    config.optimizer.accumulate_steps = 28
    config.train.update({"steps": STEPS, "log_every": 1, "checkpoint_every": 10})
    config.train.mesh.update({"slice": 2, "data": 1, "fsdp": -1})
    config.eval.update({"every": STEPS, "batches": 2})
    return config
