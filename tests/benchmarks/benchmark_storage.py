"""Runs on a bucket that outlive kills and a faulty network: `python -m tests.benchmarks.benchmark_storage WHAT`.

Each run is a process that trains tests/train/tiny.py in a work directory of a real server's bucket on loopback. The
digests of its last checkpoint (parameters, moments, EMA, statistics) are compared with those of one run on a local
disk.

    kill     --runs N runs (10) are killed at a random step (SIGKILL) and started again
    faults   --runs N runs (20), whose seeds begin with --first (0), at each of the shares 5% and 30% of broken requests
             (tests/buckets.py says how); a run that ends with 75 is started again, up to 5 times
    down     nothing gets through to the bucket from the middle of a run on: it ends with 75; with the network back,
             the next start resumes
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from emu_jax.checkpoints.store import read_meta
from tests.buckets import FaultyProxy, free_port, gcs_environment, gcs_server
from tests.train import tiny

ROOT = Path(__file__).parents[2]


def run(
    workdir: str, documents: Path, steps: int, variables: dict[str, str], *words: str
) -> subprocess.CompletedProcess:
    """Trains in a process of its own."""
    return subprocess.run(
        [
            *(sys.executable, "-m", "tests.train.run", workdir, *words),
            f"--config.data.source={documents}",
            f"--config.train.steps={steps}",
            "--config.train.checkpoint_every=10",
            "--config.train.log_every=10",
        ],
        cwd=ROOT,
        env=os.environ | variables,
        capture_output=True,
        text=True,
    )


def digests(workdir: Path, steps: int) -> dict[str, int]:
    """The digests of a run's last checkpoint; {} without one. Reads the server's folder itself."""
    folder = workdir / "checkpoints" / str(steps)
    return read_meta(folder)["digests"] if (folder / "meta" / "metadata").exists() else {}


def rows(workdir: Path) -> list[int]:
    """The steps of metrics.jsonl."""
    file = workdir / "metrics.jsonl"
    return [json.loads(line)["step"] for line in file.read_text().splitlines()] if file.exists() else []


def kill(folder: Path, documents: Path, options: argparse.Namespace, expected: dict[str, int]) -> None:
    print("run  killed at  codes        bitwise  rows")
    dice = random.Random(options.seed)
    with gcs_server(folder) as url:
        for i in range(options.runs or 10):
            step, name = dice.randrange(1, options.steps), f"kill-{i}"
            codes = [
                run(f"gs://bucket/{name}", documents, options.steps, gcs_environment(url), *words).returncode
                for words in (("--signal-at", str(step)), ())
            ]
            same = digests(folder / "bucket" / name, options.steps) == expected
            whole = rows(folder / "bucket" / name) == list(range(10, options.steps + 1, 10))
            print(f"{i:3}  {step:9}  {codes!s:12} {same!s:8} {'all' if whole else 'NOT ALL'}", flush=True)


def faults(folder: Path, documents: Path, options: argparse.Namespace, expected: dict[str, int]) -> None:
    print("share  run  starts  last code  bitwise  rows     seconds  requests  broken")
    for share in options.shares:
        for i in range(options.first, options.first + (options.runs or 20)):
            port, name = free_port(), f"faults-{share}-{i}"
            with FaultyProxy(port, share, seed=i) as proxy, gcs_server(folder, proxy.url, port):
                began, starts, code = time.monotonic(), 0, 75
                while code == 75 and starts < 5:
                    done = run(f"gs://bucket/{name}", documents, options.steps, gcs_environment(proxy.url))
                    code, starts = done.returncode, starts + 1
            if code:
                print(done.stderr[-1500:], file=sys.stderr)
            same = digests(folder / "bucket" / name, options.steps) == expected
            whole = rows(folder / "bucket" / name) == list(range(10, options.steps + 1, 10))
            broken = sum(proxy.counts.values()) - proxy.counts["ok"]
            print(
                f"{share:5.0%}  {i:3}  {starts:6}  {code:9}  {same!s:7}  {'all' if whole else 'NOT ALL':7}  "
                f"{time.monotonic() - began:7.0f}  {sum(proxy.counts.values()):8}  {broken:6}",
                flush=True,
            )


def down(folder: Path, documents: Path, options: argparse.Namespace, expected: dict[str, int]) -> None:
    port = free_port()
    with FaultyProxy(port, 0.0) as proxy, gcs_server(folder, proxy.url, port):
        workdir = folder / "bucket" / "down"

        def cut() -> None:
            while not (workdir / "checkpoints" / "20" / "commit_success.txt").exists():
                time.sleep(0.05)
            proxy.share, proxy.cut_at = 1.0, time.monotonic()

        proxy.faults = ("drop", "reset", "503")
        threading.Thread(target=cut, daemon=True).start()
        variables = gcs_environment(proxy.url) | {"EMU_JAX_STORAGE_TIMEOUT": "20"}
        done = run("gs://bucket/down", documents, options.steps, variables)
        print(f"code {done.returncode}, {time.monotonic() - proxy.cut_at:.0f} s after the network was cut")
        print(done.stderr.replace("\r", "\n").strip().splitlines()[-1])
        proxy.share = 0.0
        done = run("gs://bucket/down", documents, options.steps, variables)
        print(f"started again: code {done.returncode}, bitwise {digests(workdir, options.steps) == expected}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("kill", "faults", "down"))
    parser.add_argument("--runs", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.05, 0.3])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "bucket").mkdir()
        documents = tiny.draw(folder / "documents")
        done = run(str(folder / "local"), documents, options.steps, {})
        expected = digests(folder / "local", options.steps)
        if not expected:
            raise SystemExit(done.stderr)
        {"kill": kill, "faults": faults, "down": down}[options.what](folder, documents, options, expected)


if __name__ == "__main__":
    main()
