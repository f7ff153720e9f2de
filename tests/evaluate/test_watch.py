"""Checkpoints that are scored while a run trains: each once, whichever process is killed; the best one is kept."""

import json
import shutil
import signal
import subprocess
import sys
import time

import pytest

from emu_jax.checkpoints.store import is_checkpoint, read_meta, steps_in
from emu_jax.cli import main
from emu_jax.config import load_config
from emu_jax.errors import UserError
from emu_jax.evaluate.intervals import Figure, share
from emu_jax.evaluate.watch import evaluations_file, watch
from emu_jax.train.loop import train
from tests.evaluate.samples import write_sample
from tests.train import tiny

FIGURE = "heldout_combinations: caption exactly right"
OF = {"splits": ["heldout_combinations"]}


def rows(workdir, name: str = "") -> list[dict]:
    file = evaluations_file(workdir, name)
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@pytest.fixture(scope="module")
def run(documents, tmp_path_factory):
    """Four steps with a checkpoint after each, which are kept for ever."""
    workdir = tmp_path_factory.mktemp("watched") / "run"
    words = ["train.steps=4", "train.checkpoint_every=1", "train.keep_every=1", f"data.source={documents}"]
    train(load_config(tiny.__file__, [f"--config.{word}" for word in words]), workdir)
    return workdir


def given(*values: float):
    """A score that knows its values, instead of a model that knows nothing."""
    left = list(values)

    def score(folder) -> dict[str, Figure]:
        assert is_checkpoint(folder)
        hits = round(10 * left.pop(0))
        return {FIGURE: share([True] * hits + [False] * (10 - hits))}

    return score


def test_every_checkpoint_has_one_line_and_the_best_is_kept(run, tmp_path):
    workdir = shutil.copytree(run, tmp_path / "run")
    steps = steps_in(workdir / "checkpoints")
    assert steps == [1, 2, 3, 4]
    made = list(watch(workdir, given(0.1, 0.4, 0.2, 0.4), OF, keep_best=FIGURE))
    assert made == rows(workdir)
    found = [(row["step"], row["figures"][FIGURE], "best" in row) for row in made]
    assert found == [(1, 0.1, True), (2, 0.4, True), (3, 0.2, False), (4, 0.4, False)]
    assert read_meta(workdir / "best")["digests"] == read_meta(workdir / "checkpoints" / "2")["digests"]
    assert list(watch(workdir, given(), OF)) == [], "expected that nothing is scored twice"
    other = list(watch(workdir, given(0.3, 0.2, 0.2, 0.2), {"limit": 5}, keep_best=FIGURE))
    assert len(other) == 4 and "best" in other[0], "scores of something else are no reason to leave one out"
    assert rows(workdir) == [*made, *other]


def test_a_checkpoint_that_is_removed_meanwhile_has_no_line(run, tmp_path):
    workdir = shutil.copytree(run, tmp_path / "run")
    score = given(0.1, 0.1, 0.1)

    def racing(folder):
        if folder.name == "2":
            shutil.rmtree(folder)  # the training's rotation
            raise FileNotFoundError(folder)
        return score(folder)

    assert [row["step"] for row in watch(workdir, racing, OF)] == [1, 3, 4]


@pytest.mark.long
def test_benchmarks_of_every_checkpoint(run, tmp_path, capsys):
    """Through the command: the first questions of two benchmarks; figures are those of each step's own predictions."""
    workdir = shutil.copytree(run, tmp_path / "run")
    for step in (1, 3):
        shutil.rmtree(workdir / "checkpoints" / str(step))
    for name in ("okvqa", "coco"):
        write_sample(name, tmp_path / "data" / name)
    command = ["evaluate", "--model", str(workdir), "--watch", "--data", str(tmp_path / "data"), "--limit", "2"]
    assert main([*command, "--benchmark", "okvqa,coco", "--keep-best", "coco-test-0shot: CIDEr"]) == 0
    made = rows(workdir, "okvqa+coco")
    assert [row["step"] for row in made] == [2, 4]
    for row in made:
        folder = workdir / "benchmarks" / "okvqa+coco" / f"step-{row['step']}"
        scores = {file.parent.name: json.loads(file.read_text()) for file in folder.glob("*/scores.json")}
        found = {f"{run}: {name}": each["value"] for run, s in scores.items() for name, each in s["figures"].items()}
        assert row["figures"] == found and len(scores) == 2, row
        assert all(len(file.read_text().splitlines()) == 3 for file in folder.glob("*/0-of-1.jsonl")), "two questions"
    assert "best" in made[0] and read_meta(workdir / "best")["digests"]
    capsys.readouterr()
    assert main([*command, "--benchmark", "okvqa,coco"]) == 0
    assert capsys.readouterr().out == "", "expected that nothing is scored twice"


def test_what_cannot_be_watched(run, tmp_path):
    with pytest.raises(UserError, match=r"no config\.json in it"):
        next(watch(tmp_path, given(), OF))
    with pytest.raises(UserError, match="keep_best='captions': no such figure; did you mean"):
        next(watch(shutil.copytree(run, tmp_path / "run"), given(0.1), OF, keep_best="captions"))
    assert main(["evaluate", "--model", str(run), "--keep-best", FIGURE]) == 2
    assert main(["evaluate", "--model", str(run), "--watch", "--part", "0/2"]) == 2


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
