"""A run that was killed and started again ends where the uninterrupted one does, bit for bit."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from emu_jax.checkpoints.load import load_emu
from emu_jax.checkpoints.store import EMA_PREFIX, newest_folder, read_meta
from emu_jax.workdir import read_metrics

# Each test trains several runs in processes of their own.
LONG, SLOW = pytest.mark.long, pytest.mark.slow

ROOT = Path(__file__).parents[2]
TIMES = {"tokens_per_s", "images_per_s", "step_ms", "input_wait_ms", "compute_ms", "compile_s"}
TIMES |= {"model_gflop_per_s", "useful_gflop_per_s", "slowest_process"}
STEPS = 8  # of tiny.get_config, with a checkpoint every third
# What these runs have beside tiny.get_config: an EMA, and groups that freeze a parameter, a layer and token rows.
GROUPS = (
    '(("ln_visual/.*", 1.0, None, True), ("llama/blocks/0/.*", 1.0, None, True), '
    '("llama/(embed|lm_head)/.*[:100]", 1.0, None, True), ("vision/blocks/1/.*", 0.5, 0.2, False))'
)
KEPT = ("--config.optimizer.ema_decay=0.9", f"--config.optimizer.groups={GROUPS}")


def run(workdir: Path, documents: Path, *options: str, devices: int = 1) -> subprocess.CompletedProcess:
    environment = os.environ | {
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
    }
    command = [
        sys.executable,
        "-m",
        "tests.train.run",
        str(workdir),
        f"--config.data.source={documents}",
        *KEPT,
        *options,
    ]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, documents) -> Path:
    """The work directory of a run that nothing interrupts."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    done = run(workdir, documents)
    assert done.returncode == 0, done.stderr
    return workdir


def learnt(workdir: Path) -> dict[int, dict]:
    """Every metric of every step that does not depend on the clock; of a repeated step the later one."""
    rows = read_metrics(workdir / "metrics.jsonl")
    return {row["step"]: {name: value for name, value in row.items() if name not in TIMES} for row in rows}


@pytest.mark.parametrize("when", [pytest.param("between two saves", marks=LONG), pytest.param("at random", marks=SLOW)])
def test_kill_minus_nine_changes_nothing(whole, documents, tmp_path, when):
    died_at = 5 if when == "between two saves" else int(np.random.default_rng().integers(1, STEPS))
    workdir = tmp_path / "run"
    killed = run(workdir, documents, "--signal-at", str(died_at))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    resumed = run(workdir, documents)
    assert resumed.returncode == 0, f"killed at step {died_at}: {resumed.stderr}"

    expected, got = learnt(whole), learnt(workdir)
    assert sorted(expected) == list(range(1, STEPS + 1))
    assert got == expected, f"killed at step {died_at}"
    one, other = (read_meta(newest_folder(w)) for w in (whole, workdir))
    assert one["digests"] == other["digests"], "parameters, optimizer or statistics differ"
    assert any(name.startswith(EMA_PREFIX) for name in one["digests"])
    for weights in ("raw", "ema"):
        params, resumed = (load_emu(path, weights=weights).params for path in (whole, workdir))
        for part in params:
            for leaf, other_leaf in zip(*(_leaves(tree[part]) for tree in (params, resumed)), strict=True):
                np.testing.assert_array_equal(leaf, other_leaf, err_msg=weights)


def _leaves(tree: dict) -> list[np.ndarray]:
    import jax

    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


@SLOW
def test_a_finished_run_is_left_as_it_is(whole, documents):
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.is_file()}
    done = run(whole, documents)
    assert done.returncode == 0, done.stderr
    after = {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.is_file()}
    assert after == before


MESHES = {
    "data 2, fsdp 2, tensor 2": {"data": 2, "fsdp": 2, "tensor": 2},
    "data 8": {"data": 8, "fsdp": 1},
    "fsdp 8": {"fsdp": 8},
    "fsdp 4, tensor 2": {"fsdp": 4, "tensor": 2},
    "fsdp 2, context 4": {"fsdp": 2, "context": 4},
    "slice 2, fsdp 4": {"slice": 2, "fsdp": 4},
}


TWENTY = ("--config.train.steps=20", "--config.train.checkpoint_every=20", "--config.model.causal.dropout=0.0")


@pytest.fixture(scope="module")
def one_device(documents, tmp_path_factory) -> Path:
    """Twenty steps on one device, without dropout."""
    workdir = tmp_path_factory.mktemp("one") / "run"
    done = run(workdir, documents, *TWENTY)
    assert done.returncode == 0, done.stderr
    return workdir


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=LONG if number == 0 else SLOW) for number, name in enumerate(MESHES)]
)
def test_eight_devices_train_as_one_does(documents, tmp_path, one_device, layout):
    """Losses of 20 steps agree to 1e-4; the parameters are split; a checkpoint moves from one mesh to the other."""
    mesh = [f"--config.train.mesh.{axis}={size}" for axis, size in MESHES[layout].items()]
    eight = run(tmp_path / "eight", documents, *TWENTY, *mesh, "--restore", str(one_device), devices=8)
    assert eight.returncode == 0, eight.stderr

    for a, b in zip(learnt(one_device).values(), learnt(tmp_path / "eight").values(), strict=True):
        for name in ("loss", "text_loss", "regression_loss"):
            assert abs(a[name] - b[name]) <= 1e-4 * abs(a[name]), f"step {a['step']}: {name} {a[name]} and {b[name]}"
    report = json.loads(eight.stdout.splitlines()[-1])
    for name in ("trained", "ema", "moments", "restored"):
        sizes = report[name]
        assert sizes["devices"] == 8
        # Norms, biases and what does not divide stay whole.
        ways = math.prod(size for axis, size in MESHES[layout].items() if axis in ("fsdp", "tensor"))
        assert sizes["bytes_on_first_device"] < (1 / ways + 0.2) * sizes["bytes"], sizes


@SLOW
def test_saved_on_eight_devices_restored_on_fewer(documents, tmp_path):
    """Parameters come back bit for bit, split over as many devices as there are."""
    eight = run(tmp_path / "eight", documents, "--config.train.mesh.fsdp=8", devices=8)
    assert eight.returncode == 0, eight.stderr
    saved = read_meta(newest_folder(tmp_path / "eight"))["digests"]
    saved = {name: digest for name, digest in saved.items() if name.startswith("params/")}
    for devices in (1, 2, 4):
        options = (
            f"--config.train.mesh.fsdp={devices}",
            "--config.train.steps=1",
            "--restore",
            str(tmp_path / "eight"),
        )
        done = run(tmp_path / str(devices), documents, *options, devices=devices)
        assert done.returncode == 0, done.stderr
        restored = json.loads(done.stdout.splitlines()[-1])["restored"]
        assert restored["devices"] == devices and restored["digests"] == saved, f"on {devices} devices"
