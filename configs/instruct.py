"""Instruction tuning as in the paper: low-rank adapters on the language model's attention, everything else frozen.

emu-jax prepare chats --in sharegpt --out data/sharegpt
emu-jax prepare chats --in alpaca --out data/alpaca
emu-jax prepare chats --in llava_instruct_150k.json --set images=train2017 --out data/llava
emu-jax prepare videochat --in videochat_instruct_11k.json --set videos=WebVid --out data/videochat
emu-jax prepare video_chatgpt --in VideoInstruct100K.json --set videos=ActivityNet turns=1 --out data/video_chatgpt
emu-jax train --config configs/instruct.py --workdir runs/emu-i --config.tokenizer.path=llama_tokenizer.model \\
    --config.data.mixture.sharegpt.source=data/sharegpt --config.data.mixture.alpaca.source=data/alpaca \\
    --config.data.mixture.llava.source=data/llava --config.data.mixture.videochat.source=data/videochat \\
    --config.data.mixture.video_chatgpt.source=data/video_chatgpt

To leave out a set that you do not have, set `--config.data.mixture.NAME.weight=0`. To add your own, set
`--config.data.mixture.mine.source=…` and its weight; `--config.data.source=…` uses that one instead of the mixture.

Two sources name these five sets [X]. How the paper mixed them is not published; here a set's weight is its number of
samples [I] (`SETS`). Rank 16, alpha 16 and dropout 0.05 are the reference's [C]. Batch 128, 10,000 steps, learning rate
1e-5 and 500 warm-up steps are from memory and unverified [M]. Clipping at 1.0 and pretraining's betas, eps and weight
decay are inferred [I]. A step has as many packed rows as hold 128 samples on average.

In chats only the answers are learnt; in other documents all text is. To tune over int8 weights, convert with
`emu-jax convert --quantise int8` and set `--config.model.llama.quantised=int8` here.
"""

from ml_collections import ConfigDict

from configs import pretrain, quickstart
from emu_jax.config import choose

# Thousands of samples of each set: 10,000 steps of 128 samples are 3.1 passes over every one.
SETS = {
    "sharegpt": 90,  # conversations [I]: copies have 52 to 125, the most common copy 90; the paper's is unknown
    "alpaca": 52,  # instructions; its authors' page and lists of such sets count 52,002 [X]
    "llava": 158,  # chats about an image: 58 + 23 + 77 on its authors' page; others count 157,712 in the file [X]
    "videochat": 11,  # 7 descriptions and 4 chats on its authors' page; a survey counts 11 [X]
    "video_chatgpt": 100,  # questions about a video, one sample each (turns=1): its paper and a survey [X]
}


def published() -> ConfigDict:
    """Adapters for the published sizes, on weights in bfloat16, from the paper's five sets."""
    config = pretrain.pretrain_14b()
    config.objective = "instruct"
    config.init.update({"emu": "weights/emu", "llama": "", "vision": ""})
    config.model.llama.update({"lora_rank": 16, "lora_alpha": 16.0, "lora_dropout": 0.05})
    config.model.llama.lora_targets = ("q", "k", "v", "o")
    config.model.update({"param_dtype": "bfloat16", "regression_loss_weight": 0.0})
    config.model.causal.dropout = 0.0
    config.data.update({"batch_samples": 128, "batch_rows": 0})
    config.data.mixture = ConfigDict({name: pretrain.source(thousands) for name, thousands in SETS.items()})
    config.optimizer.learning_rate = ConfigDict({"llama": 1e-5})
    config.optimizer.update({"warmup_fraction": 0.05, "clip_norm": 1.0, "accumulate_steps": 1})
    config.train.checkpoint_every = 1000
    return config


def mini() -> ConfigDict:
    """Tunes the quick start's model on chats about the embedded images:

    emu-jax train --config configs/instruct.py:mini --workdir runs/quickstart/chat \\
        --config.init.emu=runs/quickstart --config.tokenizer.path=runs/quickstart

    In some of the chats the answer is an image, which is regressed as in pretraining. The adapters are on all
    projections of the language model, because a small model that has never read a question has more to learn.
    """
    config = quickstart.get_config()
    config.objective = "instruct"
    config.init.emu = "runs/quickstart"
    config.tokenizer.path = "runs/quickstart"
    config.model.llama.update({"lora_rank": 16, "lora_alpha": 16.0, "lora_dropout": 0.05})
    config.model.llama.lora_targets = ("q", "k", "v", "o", "gate", "up", "down")
    config.data.mixture = ConfigDict()
    config.data.update({"source": "fluent_emoji_chats", "row_tokens": 288, "batch_rows": 6, "predicted_share": 1.0})
    config.optimizer.learning_rate = ConfigDict({"llama": 3e-3})
    config.optimizer.update({"warmup_fraction": 0.05, "weight_decay": 0.0})
    config.train.steps = 1100
    return config


VARIANTS = {"14b": published, "mini": mini}


def get_config(variant: str = "14b") -> ConfigDict:
    """One of `VARIANTS`."""
    return choose(VARIANTS, variant, __file__)
