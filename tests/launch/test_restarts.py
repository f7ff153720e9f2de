"""launch/worker.sh starts a job again where that can help; a program that ends as it is told stands for `emu-jax`."""

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def worker(tmp_path):
    """worker(COMMAND, CODES): runs `worker.sh COMMAND`; jobs end with these codes, and "wait" with 75 at SIGTERM."""
    (tmp_path / "emu_jax" / "launch").mkdir(parents=True)
    shutil.copy(ROOT / "launch" / "worker.sh", tmp_path / "emu_jax" / "launch")
    program = tmp_path / "emu_jax" / ".venv" / "bin" / "emu-jax"
    program.parent.mkdir(parents=True)
    program.write_text(
        """#!/usr/bin/env bash
        trap 'kill $!; exit 75' TERM
        read -r code rest < "$HOME/codes"
        echo "$rest" > "$HOME/codes"
        [ "$code" != wait ] || { sleep 60 & wait; }
        exit "$code"
        """
    )
    program.chmod(0o755)

    def run(command: str, codes: str = "") -> None:
        if codes:
            (tmp_path / "codes").write_text(codes)
        env = os.environ | {"HOME": str(tmp_path), "RESTART_SECONDS": "0"}
        subprocess.run(["emu_jax/launch/worker.sh", command], cwd=tmp_path, env=env, check=True, capture_output=True)

    return run


def codes_until(tmp_path: Path, text: str) -> list[int]:
    """The exit codes in the log, once it has `text`."""
    log = tmp_path / "emu_jax_job" / "log"
    until = time.monotonic() + 60
    while not log.exists() or text not in log.read_text():
        assert time.monotonic() < until, log.read_text()
        time.sleep(0.05)
    return [int(line.split()[-1]) for line in log.read_text().splitlines() if "ended with exit code" in line]


@pytest.mark.parametrize("last", [0, 2, 70, 130])
def test_starts_again_until_that_does_not_help(worker, tmp_path, last):
    worker("start", f"69 75 1 137 {last} 99")
    assert codes_until(tmp_path, f"exit code {last}\n") == [69, 75, 1, 137, last]


def test_gives_up(worker, tmp_path):
    worker("start", " ".join(["69"] * 20))
    assert codes_until(tmp_path, "given up") == [69] * 11


def test_stopping_is_not_restarted(worker, tmp_path):
    worker("start", "69 wait 99")
    codes_until(tmp_path, "exit code 69")
    while (tmp_path / "codes").read_text() != "99\n":  # until the second job has begun to wait
        time.sleep(0.05)
    worker("stop")
    assert codes_until(tmp_path, "exit code 75") == [69, 75]
