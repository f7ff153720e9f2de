"""`convert`, `generate` and `export` with every path in a bucket: the same bits as on a local disk."""

import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from emu_jax import Emu
from emu_jax.checkpoints.load import load_leaves
from emu_jax.checkpoints.store import open_checkpoint
from emu_jax.storage import copy_folder

torch = pytest.importorskip("torch", reason="install .[convert]")

ROOT = os.getcwd()


def run(*words, code: int = 0) -> subprocess.CompletedProcess:
    """A command of the command line, in a folder where nobody may write."""
    command = [sys.executable, "-m", "emu_jax.cli", *map(str, words)]
    environment = os.environ | {"PYTHONPATH": ROOT, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd="/proc", env=environment, capture_output=True, text=True)
    assert done.returncode == code, done.stderr[-3000:]
    return done


def leaves(folder) -> dict[str, np.ndarray]:
    checkpoint = open_checkpoint(folder)
    wanted = {name: jax.ShapeDtypeStruct(tuple(shape), kind) for name, (shape, kind) in checkpoint.leaves.items()}
    return load_leaves(checkpoint, wanted)


@pytest.mark.slow
def test_a_language_model(hugging_llama, tmp_path, bucket):
    for folder in (bucket / "llama", tmp_path / "llama"):
        assert run("convert", "--from", hugging_llama[0], "--to", folder).stdout.endswith(f"{folder}\n")
    jax.tree.map(np.testing.assert_array_equal, leaves(bucket / "llama"), leaves(tmp_path / "llama"))
    run("export", "--from", bucket / "llama", "--to", bucket / "out", "--format", "llama")
    run("export", "--from", tmp_path / "llama", "--to", tmp_path / "out", "--format", "llama")
    copy_folder(bucket / "out", tmp_path / "copied")
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert sorted(path.name for path in (tmp_path / "copied").iterdir()) == files
    for name in files:
        assert (tmp_path / "copied" / name).read_bytes() == (tmp_path / "out" / name).read_bytes(), name


def test_a_source_in_a_bucket_is_refused(bucket):
    refused = run("convert", "--from", bucket / "in", "--to", bucket / "out", code=2)
    assert refused.stderr.splitlines()[-1] == (
        f"emu-jax convert: {bucket}/in: a published file or folder, which is memory-mapped, is on a local disk; name a "
        "local path"
    )


@pytest.mark.slow
def test_a_model_that_draws(golden, tmp_path, bucket):
    tokenizer = golden / "llama_tokenizer.model"
    (bucket / "tokenizer.model").write_bytes(tokenizer.read_bytes())
    arguments = ["--from", golden / "mini-a", "--vision-head-dim", 12]
    run("convert", *arguments, "--to", bucket / "emu", "--tokenizer", bucket / "tokenizer.model")
    run("convert", *arguments, "--to", tmp_path / "emu", "--tokenizer", tokenizer)
    ours, theirs = Emu.load(f"{bucket}/emu"), Emu.load(tmp_path / "emu")
    jax.tree.map(np.testing.assert_array_equal, ours.params, theirs.params)
    for part in ("unet", "vae"):
        jax.tree.map(np.testing.assert_array_equal, leaves(bucket / "emu" / part), leaves(tmp_path / "emu" / part))
    said = [
        run("generate", "--model", model, "--prompt", "a cat").stdout for model in (bucket / "emu", tmp_path / "emu")
    ]
    assert said[0] == said[1] != ""
