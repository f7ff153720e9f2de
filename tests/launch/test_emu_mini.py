"""launch/emu_mini.sh: the whole chain at a size that learns nothing, and the model that it packs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from emu_jax import Emu
from emu_jax.evaluate.quickstart.held_out import CAPTION
from emu_jax.workdir import read_metrics

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_it_trains_scores_and_packs(tmp_path):
    workdir = tmp_path / "emu-mini"
    environment = os.environ | {"VIRTUAL_ENV": sys.prefix, "WORKDIR": str(workdir), "XLA_FLAGS": ""}
    environment["PATH"] = f"{sys.prefix}/bin:{environment['PATH']}"
    done = subprocess.run(["launch/emu_mini.sh", "--config.train.steps=3"], cwd=ROOT, env=environment, text=True)
    assert done.returncode == 0
    assert CAPTION in read_metrics(workdir / "metrics.jsonl")[-1]
    assert (workdir / "report.html").is_file() and (workdir / "scores.json").is_file()
    model = Emu.load(workdir / "packed", tuned=True)
    assert model.decoder is not None and model.config.llama.lora_rank > 0
    size = sum(file.stat().st_size for file in (workdir / "packed").rglob("*.safetensors"))
    assert size < 20e6, f"expected a model of at most 20 MB: {size}"
