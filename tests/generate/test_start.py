"""What a start costs: the programs that common commands compile."""

import os
import re
import subprocess
import sys

from PIL import Image

from tests.pages import ROOT


def compiled(*words: str) -> list[str]:
    """The names of the programs that a Python command compiles, or finds in the cache, in order."""
    environment = os.environ | {"JAX_LOG_COMPILES": "1", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return re.findall(r"Finished XLA compilation of (jit\(.*?\)) in", done.stderr)


def test_loading_the_box_compiles_nothing():
    assert compiled("-c", "from emu_jax import Emu; Emu.load('emu-mini')") == []


def test_a_caption_compiles_the_encoder_and_the_text_once(tmp_path):
    Image.new("RGB", (64, 64), (200, 40, 40)).save(tmp_path / "x.png")
    found = compiled("-m", "emu_jax.cli", "generate", "--model", "emu-mini", "--prompt", str(tmp_path / "x.png"))
    print(found)
    assert found.count("jit(encode_images)") == found.count("jit(generate)") == 1
    assert len(found) <= 8, found
