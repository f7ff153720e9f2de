"""launch/quickstart.sh --all, at a size that learns nothing. CI runs the script without --all."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from emu_jax import Emu

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_all_of_it(tmp_path):
    workdir = tmp_path / "quickstart"
    environment = os.environ | {
        "VIRTUAL_ENV": sys.prefix,
        "WORKDIR": str(workdir),
        "XLA_FLAGS": "",
        "DECODER_STEPS": "3",
    }
    environment["PATH"] = f"{sys.prefix}/bin:{environment['PATH']}"
    command = ["launch/quickstart.sh", "--all", "--config.train.steps=3"]
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    assert done.returncode == 0
    assert done.stdout.index("$ emu-jax chat --model emu-mini") < done.stdout.index("$ emu-jax train"), (
        "the box is first"
    )
    assert (workdir / "box" / "drawing.png").is_file() and (workdir / "report.html").is_file()
    assert Emu.load(workdir, tuned=True).decoder is not None
