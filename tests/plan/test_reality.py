"""Plans against what really happens on this machine's CPU: peak memory, and FLOPs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HUNDRED_MILLION = {
    "vision.width": 512,
    "vision.heads": 8,
    "vision.mlp_dim": 2048,
    "vision.layers": 6,
    "llama.width": 768,
    "llama.heads": 12,
    "llama.mlp_dim": 2048,
    "llama.layers": 11,
}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells a process's peak memory")
@pytest.mark.parametrize("sizes", [{}, HUNDRED_MILLION], ids=["mini", "100 M"])
def test_memory_and_flops_are_those_predicted(sizes):
    overrides = [f"--config.model.{name}={value}" for name, value in ({"llama.vocab_size": 2004} | sizes).items()]
    overrides.append("--config.data.row_images=4")
    done = subprocess.run(
        [sys.executable, "-m", "tests.plan.measure", "configs/quickstart.py", *overrides],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    print(found)
    assert abs(found["measured"] / found["predicted"] - 1) < 0.1, found
    assert abs(found["agreement"] - 1) < 0.05, found
