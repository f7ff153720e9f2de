"""Going on differently, on purpose: what a resumed run may change, and where that is recorded."""

import json
import shutil

import jax.numpy as jnp
import pytest

from emu_jax.checkpoints.store import read_meta
from emu_jax.cli import main
from emu_jax.errors import UserError
from emu_jax.train.changes import check_change
from emu_jax.train.optimizer import OptimizerConfig, schedule
from emu_jax.workdir import read_metrics
from tests.train import tiny

RATE = "optimizer.learning_rate.llama"


@pytest.mark.slow
def test_a_change_holds_from_the_next_step_and_is_recorded(trained, documents, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir)
    run = ["train", "--config", tiny.__file__, "--workdir", str(workdir), f"--config.data.source={documents}"]
    run += ["--config.train.steps=2"]
    assert main([*run, f"--config.{RATE}=1e-3"]) == 2
    refused = capsys.readouterr().err
    assert f"{RATE} is 0.001 there" not in refused and "and 0.001 here; use a new work directory, or change" in refused

    changes = ["--change", f"config.{RATE}=1e-3", "--change", "config.train.steps=4", "--skip-windows", "2"]
    assert main([*run, *changes]) == 0
    rows = {row["step"]: row for row in read_metrics(workdir / "metrics.jsonl")}
    assert sorted(rows) == [1, 2, 3, 4]
    config = json.loads((workdir / "config.json").read_text())
    assert config["optimizer"]["learning_rate"]["llama"] == 1e-3 and config["train"]["steps"] == 4
    settings = OptimizerConfig.from_dict(config["optimizer"])
    for step in (3, 4):
        expected = 1e-3 * float(schedule(settings, jnp.asarray(step - 1), jnp.asarray(4)))
        assert rows[step]["learning_rate/llama"] == pytest.approx(expected)
    (line,) = read_metrics(workdir / "history.jsonl")
    before = json.loads((trained / "config.json").read_text())["optimizer"]["learning_rate"]["llama"]
    assert line["change"] == {RATE: [before, 1e-3], "train.steps": [2, 4]}
    assert line["step"] == 2 and line["skipped_windows"] == 2

    capsys.readouterr()
    history = (workdir / "history.jsonl").read_bytes()
    assert main([*run, *changes]) == 0, "the same command again, as a job that is restarted gives it"
    assert main(run) == 2, "and the first command does not change it back"
    assert f"{RATE} is 0.001 there" in capsys.readouterr().err
    assert main([*run, *changes, "--change", "config.train.steps=3"]) == 2
    assert "config.train.steps=3: the run has had 4; expected that or more" in capsys.readouterr().err
    assert (workdir / "history.jsonl").read_bytes() == history


@pytest.mark.slow
def test_weights_of_a_mixture_change(documents, tmp_path):
    """Also where the run is killed before its next checkpoint: then only config.json says so."""
    workdir, weight = tmp_path / "run", "data.mixture.one.weight"
    run = ["train", "--config", tiny.__file__, "--workdir", str(workdir), "--config.data.source="]
    run += [f"--config.data.mixture.{name}.source={documents}" for name in ("one", "two")]
    run += ["--config.data.mixture.one.weight=1.0", "--config.data.mixture.two.weight=1.0", "--config.train.steps=4"]
    run += ["--config.train.checkpoint_every=2", "--config.data.packing_window=2", "--config.data.batch_rows=1"]
    assert main(run) == 0
    before = (workdir / "config.json").read_text()
    shutil.rmtree(workdir / "checkpoints" / "4")
    changed = [*run, "--change", f"config.{weight}=3.0"]
    assert main(changed) == 0
    shutil.rmtree(workdir / "checkpoints" / "4")
    assert main([*run, f"--config.{weight}=3.0"]) == 0, "as after a kill, without the change"
    assert before != (workdir / "config.json").read_text()
    (line,) = read_metrics(workdir / "history.jsonl")
    assert line["step"] == 2 and line["change"] == {weight: [1.0, 3.0]}
    earlier = read_meta(workdir / "checkpoints" / "4")["iterator"]["earlier"]
    assert [weights for _, weights in earlier] == [{"one": 1.0, "two": 1.0}]


@pytest.mark.parametrize(
    ("name", "there", "here"),
    [
        (RATE, 1e-3, 1e-4),
        ("optimizer.clip_norm", 1.0, 0.0),
        ("train.checkpoint_minutes", 0.0, 30.0),
        ("train.steps", 0, 100),
        ("train.minutes", 60, 0.0),
        ("data.mixture.mmc4.weight", 64, 32.0),
    ],
)
def test_what_may_change(name, there, here):
    check_change(name, there, here)


@pytest.mark.parametrize(
    ("name", "there", "here", "why"),
    [
        (RATE, 1e-3, 0.0, "from 0.001 to 0.0 within a run: with 0 its state is another; choose a small value"),
        ("data.mixture.mmc4.weight", None, 1.0, "from None to 1.0 within a run"),
        ("data.seed", 0, 1, "within a run: the saved position in the data depends on it; use a new work directory"),
        ("data.mixture.mmc4.epochs", 0, 1, "within a run: the saved position in the data depends on it"),
        ("optimizer.ema_decay", 0.0, 0.9, "within a run: the optimizer's state depends on it"),
        ("train.minutes", 60, 90, "within a run: they became a number of steps at the first start; change them to 0"),
        ("train.seed", 0, 1, "within a run: the steps so far depend on it"),
        ("init.emu", "", "weights/emu", "within a run: only the first start of a run reads it"),
        ("model.llama.width", 16, 32, "within a run: the parameters depend on it"),
    ],
)
def test_what_may_not_change(name, there, here, why):
    with pytest.raises(UserError) as raised:
        check_change(name, there, here)
    assert str(raised.value).startswith(f"change: {name} cannot change {why}")
