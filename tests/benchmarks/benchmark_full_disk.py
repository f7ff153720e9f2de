"""A disk fills up under a run: what the run says, after how long, and how it resumes once there is room.

`python -m tests.benchmarks.benchmark_full_disk [CASE…]` as root (it mounts a tmpfs of 24 MB); prints a table. A CASE is
ROW:KILOBYTES (once metrics.jsonl has ROW rows, all but so many kilobytes are taken), or save:KILOBYTES (in the middle
of a save). A case is three starts of one run: the one whose disk fills up, one on the full disk, one with room again.
"""

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from emu_jax.checkpoints.store import read_meta
from emu_jax.cli import main
from emu_jax.train import loop  # noqa: F401  (imported once, for all forks)
from tests.train import tiny

CASES = ("1:0", "5:100", "9:0", "14:300", "22:100", "22:0", "29:4", "36:100", "save:0", "save:100")
STEPS = 40


def fork(workdir: Path, documents: Path) -> tuple[int, Path]:
    """Starts a run; returns its process and the file with its output."""
    log = documents.with_name("log")
    process = os.fork()
    if process:
        return process, log
    with log.open("w") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    options = {"steps": STEPS, "checkpoint_every": 10, "keep_checkpoints": 2}
    fields = [f"--config.train.{name}={value}" for name, value in options.items()]
    words = [
        "train",
        "--config",
        tiny.__file__,
        "--workdir",
        str(workdir),
        f"--config.data.source={documents}",
        *fields,
    ]
    code = 1
    with contextlib.suppress(Exception):
        code = main(words)
    sys.stdout.flush()
    os._exit(code)


def wait(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def last_line(log: Path) -> str:
    return log.read_text().replace("\r", "\n").strip().splitlines()[-1]


def digests(workdir: Path) -> dict:
    return read_meta(workdir / "checkpoints" / str(STEPS))["digests"]


def until(event: Callable[[], bool], process: int) -> None:
    """Returns at the event, or when the process has ended."""
    while not event() and os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        time.sleep(0.005)


def fill(folder: Path, kilobytes: int) -> Path:
    """Writes a file into `folder` that leaves so many kilobytes."""
    disk, file = os.statvfs(folder), folder / "fill"
    with contextlib.suppress(OSError), file.open("wb", buffering=0) as opened:
        opened.write(bytes(max(disk.f_bavail * disk.f_bsize - 1024 * kilobytes, 0)))
    return file


def case(name: str, documents: Path, expected: dict) -> str:
    when, kilobytes = name.split(":")
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", folder], check=True)
        try:
            workdir = Path(folder) / "run"
            metrics, checkpoints = workdir / "metrics.jsonl", workdir / "checkpoints"
            process, log = fork(workdir, documents)
            if when == "save":
                until(
                    lambda: any("tmp" in path.name and path.name.startswith("20") for path in checkpoints.glob("*")),
                    process,
                )
            else:
                until(lambda: metrics.exists() and metrics.read_bytes().count(b"\n") >= int(when), process)
            taken, began = fill(Path(folder), int(kilobytes)), time.monotonic()
            code = wait(process)
            seconds, said = time.monotonic() - began, last_line(log)
            began = time.monotonic()
            again = wait(fork(workdir, documents)[0])
            seconds_again = time.monotonic() - began
            said_again = last_line(log)
            taken.unlink()
            freed = wait(fork(workdir, documents)[0])
            same = freed == 0 and digests(workdir) == expected
        finally:
            subprocess.run(["umount", "--lazy", folder], check=True)
    return (
        f"| {name} | {code} | {seconds:.1f} | {said} | {again} | {seconds_again:.1f} | {said_again} | {freed} | "
        f"{'bitwise' if same else 'DIFFERS'} |"
    )


def run() -> None:
    with tempfile.TemporaryDirectory() as folder:
        documents = tiny.draw(Path(folder) / "documents")
        process, log = fork(Path(folder) / "run", documents)
        assert wait(process) == 0, last_line(log)
        expected = digests(Path(folder) / "run")
        print("| case | code | s | last line | full: code | s | last line | freed | result |", flush=True)
        print("|---|---|---|---|---|---|---|---|---|", flush=True)
        for name in sys.argv[1:] or CASES:
            print(case(name, documents, expected), flush=True)


if __name__ == "__main__":
    run()
