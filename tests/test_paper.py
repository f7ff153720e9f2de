"""Follows docs/paper.md, "Training as in the paper", word for word: from raw files to an answer and a drawing.

Published files are small and random, in their own layouts; raw data are the records of docs/data-formats.md. Sizes of
the models and lengths of the runs are added to the commands.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as PIL

from emu_jax.cli import main
from tests.evaluate.people import TRAIN, people
from tests.pages import ROOT, blocks, commands
from tests.test_data_formats import groups, write

PAGE = Path("docs/paper.md")
SECTION = "Training as in the paper"
SOURCES = ("pairs", "mmc4", "videos", "storyboards", "chats", "videochat", "video_chatgpt")

VISION = {"image_size": 28, "width": 48, "layers": 2, "heads": 4, "mlp_dim": 128}  # `eva_clip`'s
LLAMA = {"width": 32, "layers": 2, "heads": 4, "mlp_dim": 56, "context": 512}
CAUSAL = {"queries": 4, "width": 24, "layers": 2, "heads": 4, "head_dim": 6, "mlp_dim": 40}
UNET = {"block_channels": (32, 64, 64, 64), "heads": 4}  # the golden decoder's
SHORT = ("--config.train.steps=2", "--config.train.log_every=1", "--config.train.checkpoint_every=2")
EMU = (
    *(f"--config.model.vision.{name}={value}" for name, value in VISION.items()),
    *(f"--config.model.llama.{name}={value}" for name, value in LLAMA.items()),
    *(f"--config.model.causal.{name}={value}" for name, value in CAUSAL.items()),
    *(
        "--config.data.row_tokens=512",
        "--config.data.packing_window=16",
        "--config.data.max_padding=1.0",
        "--config.data.workers=0",
    ),
)
SIDE = 64  # pixels of a drawing
# Added to the commands that have one of these words.
ADDED = {
    "prepare": (f"--image-size={SIDE}",),
    "precompute": (f"--image-size={SIDE}",),
    "EVA01_CLIP_g_14_plus_psz14_s11B.pt": (f"--vision-head-dim={VISION['width'] // VISION['heads']}",),
    "configs/pretrain.py:14b": (*EMU, *SHORT, "--config.data.batch_rows=4"),
    "configs/instruct.py": (*EMU, *SHORT, "--config.data.batch_samples=8"),
    "configs/decoder.py:published": (
        *(f"--config.unet.{name}={value}" for name, value in UNET.items()),
        *("--config.data.batch=4", *SHORT),
    ),
    "chat": ("--max-new-tokens=4",),
    "generate": ("--steps=2",),
}


@pytest.fixture
def stage(tmp_path, monkeypatch, golden, eva_clip) -> Path:
    """A folder with everything that the section's commands read."""
    transformers = pytest.importorskip("transformers", reason="install .[compare]")
    config = transformers.LlamaConfig(
        vocab_size=32_000,
        hidden_size=LLAMA["width"],
        intermediate_size=LLAMA["mlp_dim"],
        num_hidden_layers=LLAMA["layers"],
        num_attention_heads=LLAMA["heads"],
        rms_norm_eps=1e-6,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "LLaMA-13B")
    shutil.copy(golden / "llama_tokenizer.model", tmp_path / "LLaMA-13B" / "tokenizer.model")
    shutil.copy(eva_clip[0], tmp_path)
    for part in ("unet", "vae", "scheduler"):
        shutil.copytree(golden / "mini-a" / "pretrain" / part, tmp_path / "stable-diffusion-v1-5" / part)
    for group in groups():
        if group[-1].headings[1].startswith("Raw data") and group[-1].headings[-1] in SOURCES:
            write(group, tmp_path)
    for name in ("laion-2b", "laion-aesthetics"):
        shutil.copytree(tmp_path / "laion-coco", tmp_path / name)
    PIL.fromarray(people(TRAIN)[0].pixels).save(tmp_path / "dog.png")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_the_papers_training(stage, capsys):
    lines = {block.line: block.headings[-1] for block in blocks(PAGE)}
    done = []
    for number, words in commands(PAGE):
        if lines[max(line for line in lines if line < number)] != SECTION:
            continue
        if words[0] == "cp":
            subprocess.run(words, check=True)
            continue
        added = [option for word, options in ADDED.items() if word in words for option in options]
        capsys.readouterr()
        assert main([*words[1:], *added]) == 0, f"{PAGE}:{number}: {words}\n{capsys.readouterr().err}"
        done.append((words[1], capsys.readouterr().out))
    assert [name for name, _ in done].count("train") == 3, done
    assert dict(done)["chat"].strip(), "expected an answer"
    drawing = np.asarray(PIL.open(stage / "drawing.png"))
    assert drawing.std() > 1, drawing
    for run, sources in {"emu": 5, "emu-i": 5, "emu/unet": 2}.items():
        config = json.loads((stage / "runs" / run / "config.json").read_text(encoding="utf-8"))
        read = [source["source"] for source in config["data"]["mixture"].values()]
        assert len(read) == sources and all((stage / source).is_dir() for source in read), read
        rows = (stage / "runs" / run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        assert len(rows) == 2 and all(np.isfinite(json.loads(row)["loss"]) for row in rows), rows
