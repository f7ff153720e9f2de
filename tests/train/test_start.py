"""How `emu-jax train` starts: compiling alone, caches, traces, where the time goes, and what is refused in one line."""

import json
import os
import re
import shutil
import subprocess
import sys
import time

import pytest
from ml_collections import ConfigDict

from emu_jax.checkpoints.store import read_meta
from emu_jax.cli import main
from emu_jax.config import load_config
from emu_jax.errors import UserError
from emu_jax.train.loop import train
from emu_jax.train.metrics import Goodput
from emu_jax.workdir import read_metrics
from tests.train import tiny
from tests.train.test_resume import ROOT


def arguments(documents, workdir, *options: str) -> list[str]:
    return [
        *("train", "--config", tiny.__file__, "--workdir", str(workdir)),
        *(f"--config.data.source={documents}", *options),
    ]


def test_compile_only_tells_time_and_memory_and_writes_nothing(documents, tmp_path, capsys):
    assert main(arguments(documents, tmp_path / "run", "--compile-only")) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"compiled the step in \d+\.\d s for 1 devices of 1 processes", first)
    number = r"(\d+\.\d{3})"
    parts = f"arguments {number}, results {number}, temporary {number}, program {number}"
    sizes = re.fullmatch(rf"memory of a device, GB: {number} \({parts}\)", second)
    assert float(sizes[1]) > 0 and float(sizes[1]) == pytest.approx(sum(map(float, sizes.groups()[1:])), abs=0.003)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_what_compile_only_has_cached_training_does_not_compile(documents, tmp_path):
    cache = str(tmp_path / "cache")
    for option in (["--compile-only"], ["--config.train.steps=2"]):
        command = [sys.executable, "-m", "emu_jax.cli", *arguments(documents, tmp_path / "run"), *option]
        environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
        environment |= {"JAX_PLATFORMS": "cpu", "JAX_LOG_COMPILES": "1", "JAX_DEBUG_LOG_MODULES": "jax._src.compiler"}
        done = subprocess.run(
            [*command, "--compilation-cache", cache], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    assert re.search(r"cache hit for 'jit_train_step'", done.stderr), done.stderr[-3000:]


@pytest.mark.slow
def test_a_trace_of_some_steps_and_where_the_time_went(documents, tmp_path):
    config = load_config(tiny.__file__, [f"--config.data.source={documents}", "--config.train.steps=3"])
    config.train.checkpoint_every = 2
    train(config, tmp_path / "run", profile=range(2, 4))
    assert len(list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))) == 1
    rows = read_metrics(tmp_path / "run" / "goodput.jsonl")
    assert [row["step"] for row in rows] == [0, 2, 3]
    for row in rows:
        parts = [row[name] for name in (*Goodput.LOSSES, "training_s")]
        assert min(parts) >= 0 and row["goodput"] == pytest.approx(row["training_s"] / sum(parts))
    assert rows[-1]["compile_s"] > 0 and rows[-1]["checkpoint_s"] > rows[0]["checkpoint_s"] == 0
    assert rows[-1]["restart_s"] == 0


@pytest.mark.slow
def test_data_divided_anew_only_when_asked(documents, tmp_path, capsys):
    """A run of one shard goes on with two, and then needs not be asked again."""
    run = arguments(documents, tmp_path / "run", "--config.train.steps=4", "--config.train.checkpoint_every=2")
    assert main([*run, "--config.data.batch_rows=4"]) == 0
    more = [*run, "--config.data.batch_rows=4", "--config.data.shards=2"]
    checkpoint = tmp_path / "run" / "checkpoints" / "4"
    shutil.rmtree(checkpoint)  # as if it had been stopped earlier
    assert main(more) == 2
    assert (
        capsys.readouterr()
        .err.strip()
        .endswith(
            "run: it belongs to another config: data.shards is 1 there and 2 here; use a new work directory, or "
            "reshard_data to resume near its position in the data"
        )
    )
    assert main([*more, "--reshard-data"]) == 0
    state = read_meta(checkpoint)["iterator"]
    assert sorted(state["shards"]) == ["0", "1"] and state["offset"] > 0
    shutil.rmtree(checkpoint)
    assert main(more) == 2, "the checkpoint that is left was taken with one shard"
    assert "the checkpoint was taken with shards=1, this run has shards=2" in capsys.readouterr().err


@pytest.mark.slow
def test_data_that_end_before_the_steps(documents, tmp_path):
    config = load_config(tiny.__file__, ["--config.train.steps=100"])
    config.data.mixture = ConfigDict({"few": {"source": str(documents), "epochs": 1}})
    config.data.update({"source": "", "batch_rows": 1})
    with pytest.raises(
        UserError, match=r"^config\.data: every source has had its epochs, and the run has not had its ste"
    ):
        train(config, tmp_path / "run")


def test_steps_that_were_lost_and_the_pause_are_restarts(tmp_path):
    """A run is ended behind its checkpoint of step 6, which is damaged: it goes on from step 3."""
    path = tmp_path / "goodput.jsonl"
    began = time.time() - 100
    run = Goodput(path, began)
    run.start(0)
    with run.losing("input_wait_s"):
        time.sleep(0.2)
    for step in (3, 6):
        run.write(step)
    saved = read_metrics(path)[1]
    assert saved["startup_s"] == pytest.approx(100, abs=0.5) and saved["input_wait_s"] == pytest.approx(0.2, abs=0.1)

    time.sleep(0.3)
    again = time.time()
    run = Goodput(path, again)
    with run.losing("compile_s"):
        time.sleep(0.1)
    run.start(3)
    run.write(6)
    rows = read_metrics(path)
    assert [row["step"] for row in rows] == [0, 3, 3, 6]
    last = rows[-1]
    assert last["restart_s"] == pytest.approx(again - saved["time"], abs=1e-6)
    assert last["compile_s"] == pytest.approx(0.1, abs=0.05)
    whole = sum(last[name] for name in (*Goodput.LOSSES, "training_s"))
    assert whole == pytest.approx(last["time"] - began, abs=1e-6)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--profile-steps", "5:3"], "profile_steps=5:3: expected FIRST:LAST, steps counted from 1, as in 10:15"),
        (["--profile-steps", "0:3"], "profile_steps=0:3: expected FIRST:LAST"),
        (["--profile-steps", "ten"], "profile_steps=ten: expected FIRST:LAST"),
        (["--profile-steps", "5:9"], "profile_steps=5:9: the run ends after config.train.steps=8"),
        (["--compilation-cache", "/dev/null/cache"], "--compilation-cache /dev/null/cache: cannot be written (Not a"),
        (["--workdir", "/dev/null/run"], "workdir=/dev/null/run: nothing can be written in /dev/null (Not a"),
        # Root may write everywhere but where the file system itself refuses.
        (["--workdir", "x" * 300], f"workdir={'x' * 300}: cannot be read (File name too long); name another folder"),
        (["--change", "train.steps=9"], "--change train.steps=9: expected config.<field>=<value>"),
        (["--change", "config.train.steps=9"], "change=train.steps: workdir="),
        (["--workdir", "/proc/run"], "workdir=/proc/run: nothing can be written in /proc ("),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(documents, tmp_path, capsys, options, expected):
    assert main([*arguments(documents, tmp_path / "run"), *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"emu-jax train: {expected}") and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_wrong_variables_are_refused_in_one_line(documents, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("EMU_JAX_TIMEOUT", "soon")
    assert main(arguments(documents, tmp_path / "run")) == 2
    assert capsys.readouterr().err == "emu-jax train: EMU_JAX_TIMEOUT='soon'; expected seconds, at least 5\n"


@pytest.mark.slow
def test_a_run_says_what_it_wastes_and_what_it_does_not_read(tmp_path, documents, capsys):
    overrides = ["data.row_images=30", "data.mixture.mine.source=elsewhere", "train.steps=1"]
    config = load_config(tiny.__file__, [f"--config.{o}" for o in (f"data.source={documents}", *overrides)])
    train(config, tmp_path / "run")
    lines = capsys.readouterr().err.splitlines()
    assert (
        f"config.data.source={documents} is read on its own, not config.data.mixture (mine); --config.data.source= "
        in (line.removesuffix("reads the mixture") for line in lines)
    )
    (wasted,) = [line for line in lines if line.startswith("config.data: ")]
    assert "% of the image slots are empty; row_images=" in wasted and "would fit better than 30" in wasted


@pytest.mark.slow
def test_rows_that_are_measured_are_recorded(tmp_path, documents):
    """And the run resumes by the same config, whose sizes are open."""
    overrides = [f"data.source={documents}", "data.row_images=0", "data.batch_rows=0", "data.batch_samples=24"]
    config = [f"--config.{o}" for o in (*overrides, "train.steps=2")]
    train(load_config(tiny.__file__, config), tmp_path / "run")
    recorded = json.loads((tmp_path / "run" / "config.json").read_text(encoding="utf-8"))["data"]
    assert recorded["row_images"] > 0 and recorded["batch_rows"] > 0 and recorded["batch_samples"] == 24
    again = train(load_config(tiny.__file__, config), tmp_path / "run")
    assert int(again.step) == 2
