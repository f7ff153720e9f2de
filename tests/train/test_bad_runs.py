"""`emu-jax train` with each cause of bad steps: what it says, what it saves, and how it resumes afterwards."""

import json
import shutil

import numpy as np
import pytest

from emu_jax.checkpoints.load import load_leaves
from emu_jax.checkpoints.store import newest_folder, open_checkpoint, read_meta
from emu_jax.cli import main
from emu_jax.data.latents import Latents
from emu_jax.errors import EXIT_DIVERGED
from emu_jax.train.distributed import Diverged
from emu_jax.train.loop import train
from emu_jax.workdir import read_metrics
from tests.data.folders import write_latents
from tests.train import tiny
from tests.train.test_init_from import make_config, parts, wanted  # noqa: F401  (a fixture)

pytestmark = pytest.mark.slow


def run(workdir, *words: str) -> int:
    return main(["train", "--config", tiny.__file__, "--workdir", str(workdir), *words])


def losses(workdir) -> list[float]:
    return [row["loss"] for row in read_metrics(workdir / "metrics.jsonl")]


def test_a_rate_of_1e30_and_a_sane_one_afterwards(documents, tmp_path, capsys):
    """In the middle of a run that learns: nothing is lost, and the run that resumes is the one that never diverged."""
    source, steps = f"--config.data.source={documents}", 60
    length = f"--config.train.steps={steps}"
    assert run(tmp_path / "run", source, "--config.train.steps=20") == 0
    shutil.copytree(tmp_path / "run", tmp_path / "sane")
    good = read_meta(newest_folder(tmp_path / "run"))
    change = ["--change", f"config.train.steps={steps}", "--change"]

    capsys.readouterr()
    absurd = [*change, "config.optimizer.learning_rate.llama=1e30"]
    assert run(tmp_path / "run", source, "--config.train.steps=20", *absurd) == EXIT_DIVERGED
    said = capsys.readouterr().err.splitlines()[-1]
    assert (
        "10 bad steps in a row, the last one is step 30: at step 21 learning_rate/llama=" in said
        and "documents of" in said
    )
    assert newest_folder(tmp_path / "run").name == "20"
    assert read_meta(newest_folder(tmp_path / "run"))["digests"] == good["digests"]
    # The same parameters before every bad step.
    rows = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if row["step"] > 20]
    assert len(rows) == 10 and all(row["param_norm/llama"] == rows[0]["param_norm/llama"] for row in rows), rows

    sane = [*change, "config.optimizer.learning_rate.llama=1e-3"]
    for name in ("run", "sane"):
        assert run(tmp_path / name, source, length, *sane) == 0
    first, second = (read_meta(newest_folder(tmp_path / name)) for name in ("run", "sane"))
    assert first["digests"] == second["digests"]
    found = losses(tmp_path / "run")
    assert len(found) == steps and np.mean(found[-10:]) < np.mean(found[10:20]) - 0.5, found


def test_a_rate_whose_update_is_finite(documents, tmp_path, capsys):
    """It is saved before a step shows what it has done."""
    source = f"--config.data.source={documents}"
    assert run(tmp_path / "run", source, "--config.train.steps=20") == 0
    change = ["--change", "config.train.steps=40", "--change"]
    absurd = [*change, "config.optimizer.learning_rate.llama=1e18"]
    assert run(tmp_path / "run", source, "--config.train.steps=20", *absurd) == EXIT_DIVERGED
    said = capsys.readouterr().err.splitlines()[-1]
    assert "the first step after this checkpoint was bad" in said, said
    sane = [*change, "config.optimizer.learning_rate.llama=1e-3"]
    assert run(tmp_path / "run", source, "--config.train.steps=20", *sane) == 0
    found = losses(tmp_path / "run")
    assert len(found) == 40 and np.mean(found[-10:]) < np.mean(found[10:20]) - 0.2, found


def test_inf_in_one_document(drawing, tmp_path, capsys):
    """The decoder's latents hold floats. A run of 40 steps reads each of 12 examples often."""
    latents = Latents(drawing / "latents")
    examples = list(latents.read(range(len(latents))))
    bad = examples[5]
    condition = bad.condition.copy()
    condition[0, 0] = np.inf
    examples[5] = type(bad)(bad.key, bad.mean, bad.deviation, condition, condition)
    write_latents(tmp_path / "latents", [examples])
    config = tiny.decoder_config(tmp_path / "latents")
    config.train.update({"steps": 40, "checkpoint_every": 10})
    config.loss.condition_drop = 0.0
    train(config, tmp_path / "unet")
    said = capsys.readouterr().err
    lines = [line for line in said.splitlines() if "changes nothing" in line]
    rows = read_metrics(tmp_path / "unet" / "metrics.jsonl")
    assert len(lines) == rows[-1]["bad_steps"] > 5 and all(bad.key in line for line in lines), said
    assert np.isfinite([row["loss"] for row in rows if not row["bad_steps_in_a_row"]]).all()
    read_finite(tmp_path / "unet")


def test_one_nan_weight(parts, documents, hugging_llama, tmp_path):  # noqa: F811
    """In a file of a published format, converted and trained on."""
    from safetensors.numpy import load_file, save_file

    folder = tmp_path / "llama"
    shutil.copytree(hugging_llama[0], folder)
    name = "model.layers.1.mlp.up_proj.weight"
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    tensors = load_file(folder / index[name])
    tensors[name][3, 4] = np.nan
    save_file(tensors, folder / index[name], {"format": "pt"})
    assert main(["convert", "--from", str(folder), "--to", str(tmp_path / "converted")]) == 0
    config = make_config(parts, documents)
    config.init.llama = str(tmp_path / "converted")
    config.train.update({"steps": 40, "checkpoint_every": 5})
    with pytest.raises(Diverged, match=r"^step 0: .* not finite in params/llama/blocks/mlp/up/kernel; .* config\.init"):
        train(config, tmp_path / "run")
    assert not [*(tmp_path / "run").glob("checkpoints/[0-9]*")]


def read_finite(workdir) -> None:
    checkpoint = open_checkpoint(workdir)
    for leaf, value in load_leaves(checkpoint, wanted(checkpoint.leaves)).items():
        assert np.isfinite(np.asarray(value)).all(), leaf
