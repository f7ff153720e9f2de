"""Several processes train as one does; when one is lost, hangs or is asked to stop, all end, and later go on.

Real processes on this machine, each with simulated devices of its own; `tests/train/run.py` is what they run.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Set
from pathlib import Path

import pytest

from emu_jax.checkpoints.store import newest_folder, read_meta
from emu_jax.cli import main
from emu_jax.errors import EXIT_AGAIN, EXIT_LOST, UserError
from emu_jax.train import exit_watchdog
from emu_jax.train.distributed import find_job
from emu_jax.workdir import read_metrics
from tests.train import recipe, tiny
from tests.train.test_resume import ROOT, STEPS, learnt

TIMEOUT = 20  # seconds of silence that lose a process
LIMIT = 120  # seconds in which all processes must have ended once one is lost


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start(
    workdir: Path, documents: Path, *options: str, processes: int, devices: int = 1, **variables: str
) -> list[subprocess.Popen]:
    """Starts the processes of a job that trains `tests/train/tiny.py`."""
    address = f"127.0.0.1:{free_port()}"
    data = (f"--config.data.source={documents}", "--config.data.shards=2")  # two processes read a shard each
    command = [sys.executable, "-m", "tests.train.run", str(workdir), *data, *options]
    started = []
    for process in range(processes):
        environment = os.environ | {
            "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}",
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": str(ROOT),
            "EMU_JAX_TIMEOUT": str(TIMEOUT),
        }
        if processes > 1:
            environment |= {"EMU_JAX_COORDINATOR": address, "EMU_JAX_PROCESSES": str(processes)}
            environment |= {"EMU_JAX_PROCESS": str(process)}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, cwd=ROOT, env=environment | variables, **pipes))
    return started


def finish(started: list[subprocess.Popen]) -> list[tuple[int, str]]:
    """Exit codes and standard errors, in order of the processes."""
    errors = [process.communicate()[1] for process in started]
    return [(process.returncode, error) for process, error in zip(started, errors, strict=True)]


def train(workdir: Path, documents: Path, *options: str, **settings) -> Path:
    """A run that nothing interrupts; returns its work directory."""
    done = finish(start(workdir, documents, *options, **settings))
    assert [code for code, _ in done] == [0] * len(done), "\n".join(error[-2000:] for _, error in done)
    return workdir


def message(error: str) -> str:
    """The last line that a process of a job has written about its end."""
    return [line for line in error.splitlines() if line.startswith("emu-jax train: ")][-1]


def assert_losses_agree(one: Path, other: Path, steps: int = STEPS, apart: Set[str] = frozenset()) -> None:
    """And all other figures of a step, but those `apart`; one process alone has no slowest one."""
    a, b = (
        {
            step: {name: value for name, value in row.items() if name not in {"slowest_process"} | apart}
            for step, row in rows.items()
        }
        for rows in (learnt(one), learnt(other))
    )
    assert sorted(a) == sorted(b) == list(range(1, steps + 1))
    for step in a:
        assert a[step].keys() == b[step].keys()
        for name, value in a[step].items():
            assert abs(value - b[step][name]) <= 1e-4 * abs(value), f"step {step}: {name} {value} and {b[step][name]}"


def counted(workdir: Path) -> list[tuple[int, int]]:
    """Tokens and images of every step."""
    rows = read_metrics(workdir / "metrics.jsonl")
    return [tuple(round(row[f"{name}_per_s"] * row["step_ms"] / 1e3) for name in ("tokens", "images")) for row in rows]


def assert_bitwise(one: Path, other: Path) -> None:
    """Every metric of every step, and every leaf of the newest state."""
    assert learnt(one) == learnt(other)
    metas = [read_meta(newest_folder(workdir)) for workdir in (one, other)]
    assert metas[0]["digests"] == metas[1]["digests"]
    assert metas[0]["iterator"] == metas[1]["iterator"]


@pytest.fixture(scope="module")
def two(tmp_path_factory, documents) -> Path:
    """The work directory of two processes that nothing interrupts."""
    return train(tmp_path_factory.mktemp("two") / "run", documents, processes=2)


@pytest.fixture(scope="module")
def one(tmp_path_factory, documents) -> Path:
    """The work directory of one process with as many devices as `two` have."""
    return train(tmp_path_factory.mktemp("one") / "run", documents, processes=1, devices=2)


@pytest.mark.long
def test_two_processes_train_as_one(one, two):
    assert_losses_agree(one, two)
    assert counted(one) == counted(two), "expected the counts of both processes"
    slowest = [row.get("slowest_process") for row in read_metrics(two / "metrics.jsonl")]
    assert set(slowest) <= {0.0, 1.0}, slowest
    assert sorted(path.name for path in two.iterdir()) == [
        *("checkpoints", "config.json", "goodput.jsonl", "metrics.jsonl", "plots", "starts.jsonl", "tensorboard")
    ]


@pytest.mark.slow
def test_processes_fall_back_to_the_same_checkpoint(two, documents, tmp_path):
    """The newest one is damaged in a file that the second process wrote, and that not every process reads."""
    workdir = tmp_path / "run"
    shutil.copytree(two, workdir)
    newest = newest_folder(workdir)
    files = [path for path in (newest / "params").rglob("ocdbt.process_1/d/*") if path.is_file()]
    victim = max(files, key=lambda path: path.stat().st_size)
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    errors = [error for _, error in finish(start(workdir, documents, processes=2))]
    lines = [line for error in errors for line in error.splitlines() if "the checkpoint is corrupt" in line]
    assert len(lines) == 1 and lines[0].startswith(f"{newest}: ") and "it is moved to" in lines[0]
    assert (workdir / "corrupt" / newest.name).is_dir()
    assert_bitwise(two, workdir)


LAYOUTS = {  # processes, devices of each, mesh
    "2 processes, fsdp 8": (2, 4, {"fsdp": 8}),
    "2 processes, data 2, tensor 4": (2, 4, {"data": 2, "fsdp": 1, "tensor": 4}),
    "2 processes, tensor 2 across them": (2, 1, {"fsdp": 1, "tensor": 2}),
    "4 processes, fsdp 4": (4, 1, {"fsdp": 4}),
    "4 processes, data 2, fsdp 4": (4, 2, {"data": 2, "fsdp": 4}),
}


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_processes_train_as_one_on_every_mesh(documents, tmp_path, layout):
    processes, devices, sizes = LAYOUTS[layout]
    mesh = [f"--config.train.mesh.{axis}={size}" for axis, size in sizes.items()]
    one = train(tmp_path / "one", documents, *mesh, processes=1, devices=processes * devices)
    assert_losses_agree(one, train(tmp_path / "many", documents, *mesh, processes=processes, devices=devices))


@pytest.mark.slow
def test_the_recipe_trains_on_two_slices_as_on_one_device(documents, tmp_path):
    """28 micro-batches a step, two processes of four devices; held-out losses, too.

    How different a micro-batch's embeddings are is measured in each slice's rows apart, and half as many differ less.
    """
    words = ("--file", recipe.__file__, f"--config.eval.source={documents}")
    one = train(tmp_path / "one", documents, *words, "--config.train.mesh.slice=1", processes=1)
    two = train(tmp_path / "two", documents, *words, processes=2, devices=4)
    assert_losses_agree(one, two, recipe.STEPS, apart={"variance_fraction", "effective_rank"})
    assert "held_out_regression_loss" in read_metrics(two / "metrics.jsonl")[-1]
    assert counted(one) == counted(two) and min(tokens for tokens, _ in counted(one)) > 224 * 32, counted(one)


@pytest.mark.slow
def test_a_killed_process_ends_the_other_and_the_run_goes_on(two, documents, tmp_path):
    """Started again, it ends bit for bit where two processes that nothing interrupts do."""
    workdir = tmp_path / "run"
    started = start(workdir, documents, "--signal-at", "5", "--process", "1", processes=2)
    started[1].wait()
    lost = time.monotonic()
    (code, error), (killed, last) = finish(started)
    assert killed == -signal.SIGKILL and time.monotonic() - lost < LIMIT
    assert code == EXIT_LOST, error
    assert "process 1 of 2 (" in message(error) and "is lost: no sign of life for" in message(error)
    assert message(last).startswith("emu-jax train: process 1 of 2 ended: a signal or a crash ended it; start it")
    assert_bitwise(two, train(workdir, documents, processes=2))


@pytest.mark.slow
def test_a_killed_coordinator_ends_the_other_and_the_run_goes_on(two, documents, tmp_path):
    workdir = tmp_path / "run"
    started = start(workdir, documents, "--signal-at", "5", processes=2)
    started[0].wait()
    lost = time.monotonic()
    (killed, _), (code, error) = finish(started)
    assert killed == -signal.SIGKILL and time.monotonic() - lost < LIMIT
    assert code == EXIT_LOST and "process 0 of 2 is lost" in message(error), error
    assert_bitwise(two, train(workdir, documents, processes=2))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "words"),
    [("SIGSTOP", "is lost: no sign of life for"), ("sleep", "hangs reading data, step 6, for more than")],
)
def test_a_process_that_hangs_is_named(documents, tmp_path, how, words):
    asked = ("--signal-at", "5", "--signal", how, "--process", "1")
    started = start(tmp_path / "run", documents, *asked, processes=2, EMU_JAX_TIMEOUT_READING=str(TIMEOUT))
    [(code, error)] = finish(started[:1])
    assert code == EXIT_LOST, error
    assert "process 1 of 2 (" in message(error) and words in message(error)
    started[1].kill()
    started[1].communicate()


@pytest.mark.slow
@pytest.mark.parametrize("process", [0, 1])
def test_sigterm_to_one_process_saves_and_stops_all(two, documents, tmp_path, process):
    workdir = tmp_path / "run"
    asked = ("--signal-at", "4", "--signal", "SIGTERM", "--process", str(process))
    done = finish(start(workdir, documents, *asked, processes=2))
    assert [code for code, _ in done] == [EXIT_AGAIN] * 2, "\n".join(error for _, error in done)
    saved = int(newest_folder(workdir).name)
    assert 4 <= saved < STEPS and f"asked to stop after step {saved} of {STEPS}: saved" in done[0][1]
    assert_bitwise(two, train(workdir, documents, processes=2))


@pytest.mark.slow
def test_sigterm_to_a_process_alone(one, documents, tmp_path):
    """It saves at the end of the step that it is in, and goes on bit for bit."""
    asked = ("--signal-at", "4", "--signal", "SIGTERM")
    [(code, error)] = finish(start(tmp_path / "run", documents, *asked, processes=1, devices=2))
    assert code == EXIT_AGAIN and "asked to stop after step 5 of 8: saved" in error, error
    assert newest_folder(tmp_path / "run").name == "5"
    assert_bitwise(one, train(tmp_path / "run", documents, processes=1, devices=2))


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(two, documents, tmp_path):
    """Two processes stop; then one, then four go on: the same data, the same losses."""
    workdir = tmp_path / "run"
    for processes in (2, 1):
        asked = ("--signal-at", "1", "--signal", "SIGTERM")
        done = finish(start(workdir, documents, *asked, processes=processes, devices=2 // processes))
        assert {code for code, _ in done} == {EXIT_AGAIN}, done
    assert_losses_agree(two, train(workdir, documents, processes=4))


@pytest.mark.slow
def test_nobody_answers_at_the_coordinators_address(documents, tmp_path, capsys, monkeypatch):
    for name, value in (job_of_two(port := free_port()) | {"EMU_JAX_PROCESS": "1", "EMU_JAX_TIMEOUT": "5"}).items():
        monkeypatch.setenv(name, value)
    arguments = ["train", "--config", tiny.__file__, "--workdir", str(tmp_path / "run")]
    assert main([*arguments, f"--config.data.source={documents}"]) == 2
    expected = f"emu-jax train: EMU_JAX_COORDINATOR=127.0.0.1:{port}: nothing answers there for 15 s ("
    assert capsys.readouterr().err.startswith(expected)


@pytest.mark.slow
def test_an_error_of_one_process_ends_the_other(documents, tmp_path):
    started = start(tmp_path / "run", documents, processes=1, EMU_JAX_PROCESS="0", **job_of_two(port := free_port()))
    other = documents.with_name("gone.jsonl")
    started += start(tmp_path / "run", other, processes=1, EMU_JAX_PROCESS="1", **job_of_two(port))
    (code, error), (own_code, own_error) = finish(started)
    assert own_code == 2 and message(own_error).endswith("expected a JSONL of pairs or documents")
    assert code == EXIT_LOST and "process 1 of 2 (" in message(error) and "gone.jsonl: no such file" in message(error)


def job_of_two(port: int) -> dict[str, str]:
    return {"EMU_JAX_COORDINATOR": f"127.0.0.1:{port}", "EMU_JAX_PROCESSES": "2"}


# ---- who is in the job -----------------------------------------------------------------------------------------------

SETTINGS = {"EMU_JAX_COORDINATOR": "10.0.0.1:8476", "EMU_JAX_PROCESSES": "4", "EMU_JAX_PROCESS": "3"}


def test_the_environment_says_who_is_who():
    assert find_job(SETTINGS) == {
        "coordinator_address": "10.0.0.1:8476",
        "num_processes": 4,
        "process_id": 3,
        "cluster_detection_method": "deactivate",
    }
    assert find_job(SETTINGS | {"EMU_JAX_PROCESSES": "1", "EMU_JAX_PROCESS": "0"}) is None
    assert find_job({}) is None, "a machine alone"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"EMU_JAX_COORDINATOR": "10.0.0.1"}, r"EMU_JAX_COORDINATOR='10.0.0.1'; expected process 0's host:port"),
        ({"EMU_JAX_PROCESSES": "two"}, r"EMU_JAX_PROCESSES='two'; expected how many .* a whole number of 1 or more"),
        ({"EMU_JAX_PROCESSES": "0"}, r"EMU_JAX_PROCESSES='0'; expected how many processes there are"),
        ({"EMU_JAX_PROCESS": "4"}, r"EMU_JAX_PROCESS='4'; expected which of EMU_JAX_PROCESSES=4 .* of 0 to 3"),
        ({"EMU_JAX_PROCESS": "-1"}, r"EMU_JAX_PROCESS='-1'; expected which"),
        ({"EMU_JAX_PROCESS": None}, r"EMU_JAX_PROCESS is not set, but EMU_JAX_COORDINATOR is; a process of several"),
    ],
)
def test_bad_settings_are_one_line(change, expected):
    environment = {name: value for name, value in (SETTINGS | change).items() if value is not None}
    with pytest.raises(UserError, match=expected) as caught:
        find_job(environment)
    assert "\n" not in str(caught.value)


def test_slurm_tells_how_many_processes_there_are(monkeypatch):
    step = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "node[001-002]", "SLURM_PROCID": "1", "SLURM_LOCALID": "0"}
    for name, value in (step | {"SLURM_NTASKS": "2"}).items():
        monkeypatch.setenv(name, value)
    assert find_job({}) == {"cluster_detection_method": "slurm"}
    monkeypatch.setenv("SLURM_NTASKS", "1")
    assert find_job({}) is None, "one task needs no cluster"


@pytest.mark.slow
def test_two_tasks_of_slurm_train_as_one(two, documents, tmp_path):
    """With the variables that Slurm sets, and none of ours."""
    step = {"SLURM_JOB_ID": str(free_port()), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    started = []
    for process in "01":
        step |= {"SLURM_PROCID": process, "SLURM_LOCALID": process}
        started += start(tmp_path / "run", documents, processes=1, **step)
    done = finish(started)
    assert [code for code, _ in done] == [0, 0], "\n".join(error[-2000:] for _, error in done)
    assert_bitwise(two, tmp_path / "run")


# ---- what is said for a process that can say nothing more ------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (exit_watchdog.GOODBYE, ""),
        (
            "",
            "emu-jax train: process 1 of 2 ended: a signal or a crash ended it; start it again to resume from the last "
            "checkpoint\n",
        ),
    ],
)
def test_last_words(words, expected):
    command = [sys.executable, "-S", exit_watchdog.__file__, "1", "2"]
    assert subprocess.run(command, input=words, capture_output=True, text=True, check=True).stderr == expected
