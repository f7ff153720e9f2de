"""Sweeps: the runs of a grid, their names and commands, and a real one that is stopped and goes on."""

import itertools
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emu_jax.cli import main
from emu_jax.errors import UserError
from emu_jax.sweep import Sweep
from emu_jax.workdir import read_metrics
from tests.train import tiny

FIELDS = {"optimizer.ema_decay": ["0", "0.9", "0.99"], "model.llama.layers": ["1", "2"], "model.vision.layers": ["1"]}


@given(st.data())
def test_every_combination_and_seed_is_a_run_once(data):
    chosen = data.draw(st.lists(st.sampled_from([*FIELDS]), unique=True))
    fields = {name: data.draw(st.lists(st.sampled_from(FIELDS[name]), min_size=1, unique=True)) for name in chosen}
    seeds = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=3, unique=True))
    runs = Sweep("configs/quickstart.py", Path("out"), fields, seeds, ["--config.train.steps=4"]).runs()
    found = [run.overrides for run in runs]
    expected = [
        (
            "--config.train.steps=4",
            *(f"--config.{name}={value}" for name, value in zip(fields, values, strict=True)),
            f"--config.train.seed={seed}",
        )
        for values in itertools.product(*fields.values())
        for seed in seeds
    ]
    assert found == expected
    assert len({run.workdir for run in runs}) == len(runs)
    for run in runs:
        assert run.workdir.parent == Path("out") and "/" not in run.name


def test_names_tell_runs_apart():
    fields = {
        "model.llama.layers": ["1", "2"],
        "model.vision.layers": ["3"],
        "optimizer.groups": ["(('a/b', 0.0, None, True),)"],
    }
    names = [run.name for run in Sweep("configs/quickstart.py", Path("out"), fields, [7]).runs()]
    assert names == [f"llama.layers={n},vision.layers=3,groups=_a_b_,_0.0,_None,_True_,_-7" for n in (1, 2)]
    assert [run.name for run in Sweep("configs/quickstart.py", Path("out"), {}, [0, 1]).runs()] == ["base-0", "base-1"]


def test_commands_for_a_scheduler(capsys):
    words = ["--vary", "train.steps", "4", "8", "--seeds", "3", "--split", "heldout_combinations"]
    assert main(["sweep", "--config", "configs/quickstart.py", "--out", "a b", *words, "--print"]) == 0
    lines = capsys.readouterr().out.splitlines()
    expected = [
        [
            *("emu-jax", "train", "--config", "configs/quickstart.py", "--workdir", f"a b/steps={steps}-3"),
            *(f"--config.train.steps={steps}", "--config.train.seed=3", "&&"),
            *("emu-jax", "evaluate", "--model", f"a b/steps={steps}-3", "--split", "heldout_combinations"),
        ]
        for steps in (4, 8)
    ]
    assert [shlex.split(line) for line in lines] == expected
    assert not Path("a b").exists()


@pytest.mark.parametrize(
    ("fields", "seeds", "said"),
    [
        ({"train.stesp": ["4"]}, [0], "config.train has no field 'stesp'; did you mean steps?"),
        ({"train.steps": ["four"]}, [0], "--config.train.steps="),
        ({"train.steps": ["4", "4"]}, [0], "vary train.steps 4 4; expected different values"),
        ({"train.seed": ["4"]}, [0], "seeds has their values"),
        ({}, [1, 1], "seeds=1 1; expected different numbers"),
        ({}, [-1], "seeds=-1; expected"),
        ({"tokenizer.path": ["a/b", "a:b"]}, [0], "two runs would be in out/path=a_b-0"),
    ],
)
def test_what_cannot_be_swept(fields, seeds, said):
    with pytest.raises(UserError, match=said):
        Sweep("configs/quickstart.py", Path("out"), fields, seeds)


@pytest.mark.long
def test_a_sweep_is_stopped_and_goes_on(documents, tmp_path):
    """SIGTERM saves the run that trains, and the same command finishes all; a run that fails stops no other."""
    out = tmp_path / "out"
    fixed = [f"--config.data.source={documents}", "--config.train.steps=6", "--config.train.checkpoint_every=100"]
    words = ["--vary", "optimizer.clip_norm", "1.0", "0.5", "--seeds", "0", *fixed]
    command = [sys.executable, "-m", "emu_jax.cli", "sweep", "--config", tiny.__file__, "--out", str(out), *words]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    first = out / "clip_norm=1.0-0"
    until = time.monotonic() + 300
    while not (first / "metrics.jsonl").exists() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 75, said
    assert said.splitlines()[-1] == "emu-jax sweep: stopped; run it again to resume"
    assert not (out / "clip_norm=0.5-0").exists()
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr
    assert [len(read_metrics(out / f"clip_norm={norm}-0" / "metrics.jsonl")) for norm in ("1.0", "0.5")] == [6, 6]
    assert "optimizer.clip_norm" in done.stdout and (out / "compare.png").is_file()
    broken = subprocess.run([*command, "--config.data.row_images=1"], capture_output=True, text=True)
    assert broken.returncode == 1, "expected that the finished runs, which had another config, refuse"
    assert broken.stderr.count("failed; its messages are above") == 2
