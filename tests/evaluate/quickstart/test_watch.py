"""Checkpoints that are scored while a run trains: each once, whichever process is killed; the best one is kept."""

import json
import shutil
import signal
import subprocess
import sys
import time

import pytest

from emu_jax.checkpoints.store import read_meta, steps_in
from emu_jax.cli import main
from emu_jax.config import load_config
from emu_jax.errors import UserError
from emu_jax.evaluate.intervals import share
from emu_jax.evaluate.quickstart import captions, watch
from emu_jax.train.loop import train
from tests.train import tiny

FIGURE = "heldout_combinations: caption exactly right"


def rows(workdir) -> list[dict]:
    file = workdir / watch.EVALUATIONS_FILE
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@pytest.fixture(scope="module")
def run(documents, tmp_path_factory):
    """Four steps with a checkpoint after each, which are kept for ever."""
    workdir = tmp_path_factory.mktemp("watched") / "run"
    words = ["train.steps=4", "train.checkpoint_every=1", "train.keep_every=1", f"data.source={documents}"]
    train(load_config(tiny.__file__, [f"--config.{word}" for word in words]), workdir)
    return workdir


@pytest.fixture
def scored(monkeypatch):
    """Scores as they are given, instead of those of a model that knows nothing."""
    given: list[float] = []

    def score(emu, splits):
        assert splits == ["heldout_combinations"]
        hits = round(10 * given.pop(0))
        return captions.Scores({FIGURE: share([True] * hits + [False] * (10 - hits))}, [], 0)

    monkeypatch.setattr(watch.captions, "score", score)
    return given


def test_every_checkpoint_has_one_line_and_the_best_is_kept(run, scored, tmp_path):
    workdir = shutil.copytree(run, tmp_path / "run")
    steps = steps_in(workdir / "checkpoints")
    assert steps == [1, 2, 3, 4]
    scored += [0.1, 0.4, 0.2, 0.4]
    made = list(watch.watch(workdir, ["heldout_combinations"], keep_best=FIGURE))
    assert made == rows(workdir)
    found = [(row["step"], row["figures"][FIGURE], "best" in row) for row in made]
    assert found == [(1, 0.1, True), (2, 0.4, True), (3, 0.2, False), (4, 0.4, False)]
    assert read_meta(workdir / "best")["digests"] == read_meta(workdir / "checkpoints" / "2")["digests"]
    assert list(watch.watch(workdir, ["heldout_combinations"])) == [], "expected that nothing is scored twice"


def test_a_checkpoint_that_is_removed_meanwhile_has_no_line(run, scored, tmp_path, monkeypatch):
    workdir = shutil.copytree(run, tmp_path / "run")
    load = watch.Emu.load

    def racing(folder, **settings):
        if folder.name == "2":
            shutil.rmtree(folder)  # the training's rotation
        return load(folder, **settings)

    monkeypatch.setattr(watch.Emu, "load", racing)
    scored += [0.1] * 3
    assert [row["step"] for row in watch.watch(workdir, ["heldout_combinations"])] == [1, 3, 4]


def test_what_cannot_be_watched(run, scored, tmp_path):
    with pytest.raises(UserError, match=r"no config\.json in it"):
        next(watch.watch(tmp_path, ["heldout_combinations"]))
    scored += [0.1]
    with pytest.raises(UserError, match="keep_best='captions': no such figure; did you mean"):
        next(watch.watch(shutil.copytree(run, tmp_path / "run"), ["heldout_combinations"], keep_best="captions"))
    assert main(["evaluate", "--model", str(run), "--keep-best", FIGURE]) == 2


@pytest.mark.slow
def test_beside_a_training_and_killed(documents, tmp_path):
    """Real processes: the watching one is killed after its first line, and what it had begun is scored again, once."""
    workdir = tmp_path / "run"
    words = ["train.steps=6", "train.checkpoint_every=2", "train.keep_every=2", f"data.source={documents}"]
    training = [sys.executable, "-m", "emu_jax.cli", "train", "--config", tiny.__file__, "--workdir", str(workdir)]
    trained = subprocess.Popen([*training, *(f"--config.{word}" for word in words)], stderr=subprocess.DEVNULL)
    until = time.monotonic() + 300
    while not (workdir / "config.json").exists() and time.monotonic() < until:
        time.sleep(0.1)
    command = [sys.executable, "-m", "emu_jax.cli", "evaluate", "--model", str(workdir), "--watch"]
    watching = subprocess.Popen([*command, "--keep-best", FIGURE])
    while not rows(workdir) and time.monotonic() < until:
        time.sleep(0.1)
    watching.send_signal(signal.SIGKILL)
    watching.wait()
    assert trained.wait(300) == 0
    done = subprocess.run([*command, "--keep-best", FIGURE], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    steps = [row["step"] for row in rows(workdir)]
    assert [step for step in steps if step] == [2, 4, 6], steps  # that of step 0 is removed early
    assert read_meta(workdir / "best")["digests"]
