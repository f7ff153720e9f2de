"""The checkpoint with the lowest held-out loss stays, and patience ends a run."""

import json
import shutil

import pytest

from emu_jax.checkpoints.store import steps_in
from emu_jax.config import load_config
from emu_jax.errors import UserError
from emu_jax.train.held_out_losses import EvalConfig
from emu_jax.train.loop import train
from emu_jax.workdir import read_metrics
from tests.train import line

# Adam with such a rate passes the points' line within three steps, and comes back much later.
OVERSHOOTS = ("optimizer.learning_rate.slope=1.5", "optimizer.learning_rate.offset=1.5", "optimizer.ema_decay=0.0")
EVALUATED = ("eval.every=1", "eval.split=other", "eval.best=loss", "train.checkpoint_every=100")


def config(*more: str):
    words = (*OVERSHOOTS, *EVALUATED, "optimizer.warmup_fraction=0.0", "train.keep_checkpoints=2", *more)
    return load_config(line.__file__, [f"--config.{word}" for word in words])


def losses(workdir) -> dict[int, float]:
    return {row["step"]: row["held_out_loss"] for row in read_metrics(workdir / "metrics.jsonl")}


def test_the_best_step_is_saved_named_and_not_rotated_out(tmp_path):
    train(config("train.steps=12", "train.checkpoint_every=2"), tmp_path)
    found = losses(tmp_path)
    best = min(found, key=found.get)
    assert 1 <= best < 8, found
    assert json.loads((tmp_path / "best.json").read_text()) == {
        "loss": "held_out_loss",
        "step": best,
        "value": found[best],
    }
    assert sorted(steps_in(tmp_path / "checkpoints")) == [best, 10, 12], "the best one and the two newest"


def test_patience_ends_the_run_and_starting_it_again_does_nothing(tmp_path, capsys):
    state = train(config("train.steps=100", "eval.patience=4"), tmp_path)
    found = losses(tmp_path)
    best = min(found, key=found.get)
    assert int(state.step) == best + 4 == max(found)
    expected = (
        f"step {best + 4}: held_out_loss has not fallen for 4 steps (config.eval.patience=4), so the run ends; the "
        f"best is step {best} with {found[best]:.4g}\n"
    )
    assert expected in capsys.readouterr().err
    assert int(train(config("train.steps=100", "eval.patience=4"), tmp_path).step) == best + 4
    assert losses(tmp_path) == found


def test_a_resumed_run_knows_its_best_step(tmp_path):
    """From a copy without the last checkpoint and without best.json, as a kill may leave it."""
    whole, again = tmp_path / "whole", tmp_path / "again"
    train(config("train.steps=12", "train.keep_checkpoints=20", "train.checkpoint_every=5"), whole)
    shutil.copytree(whole, again)
    shutil.rmtree(again / "checkpoints" / "12")
    (again / "best.json").unlink()
    train(config("train.steps=12", "train.checkpoint_every=5"), again)
    found = losses(whole)
    best = min(found, key=found.get)
    assert losses(again) == found
    assert {best, 10, 12} == set(steps_in(again / "checkpoints"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"best": "loss"}, r"config\.eval\.best=loss: nothing is evaluated; set config\.eval\.every"),
        ({"patience": 5}, r"config\.eval\.patience=5: name the loss that is waited for in config\.eval\.best"),
        ({"patience": -1}, r"config\.eval\.patience=-1; expected at least 0"),
    ],
)
def test_what_cannot_be(fields, message):
    with pytest.raises(UserError, match=message):
        EvalConfig(**fields)


def test_an_unknown_loss_is_refused_at_the_start(tmp_path):
    with pytest.raises(
        UserError, match=r"config\.eval\.best=accuracy: no such loss of the held-out data; choose one of loss$"
    ):
        train(config("eval.best=accuracy"), tmp_path)
    assert not (tmp_path / "config.json").exists()
