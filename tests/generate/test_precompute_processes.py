"""`emu-jax precompute` in processes of its own: killed and begun again, shared by two, and in constant memory."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from emu_jax.generate.precompute import CHUNK
from tests.train import tiny
from tests.train.test_resume import ROOT

RECORDS = 1500  # six chunks
SIDE = 128  # pixels of the images to draw: an example is 49 kB of pixels and 64 kB of latents


def source(documents: Path, folder: Path, records: int) -> Path:
    """The pairs of the small documents, again and again with another text."""
    lines = [json.loads(line) for line in tiny.pairs(documents).read_text(encoding="utf-8").splitlines()]
    path = folder / f"{records}.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for number in range(records):
            line = lines[number % len(lines)]
            image = str(documents.parent / line["image"])
            file.write(json.dumps({"image": image, "text": f"{line['text']} {number}"}) + "\n")
    return path


def start(model: Path, read: Path, out: Path, part: str = "0/1", side: int = 0) -> subprocess.Popen:
    command = [sys.executable, "-m", "emu_jax.cli", "precompute", "--model", str(model), "--vae", str(model / "vae")]
    command += ["--source", str(read), "--split=", "--out", str(out), "--part", part, "--image-size", str(side)]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, **pipes)


def finish(process: subprocess.Popen) -> None:
    error = process.communicate()[1]
    assert process.returncode == 0, error


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.slow
def test_two_processes_of_which_one_is_killed_make_the_same_files(drawing, documents, tmp_path):
    read = source(documents, tmp_path, RECORDS)
    finish(start(drawing, read, tmp_path / "whole"))
    out, kills = tmp_path / "shared", 0
    for killed_at in (1, 2):  # complete files of its own, which have odd numbers
        both = [start(drawing, read, out, f"{part}/2") for part in range(2)]
        while both[1].poll() is None and len(list(out.glob("examples.*[135]"))) < killed_at:
            time.sleep(0.01)
        both[1].send_signal(signal.SIGKILL)
        kills += both[1].wait() == -signal.SIGKILL
        both[1].communicate()
        finish(both[0])
    assert kills == 2, "expected to kill it in the middle of its work"
    assert (out / "unfinished").is_dir()
    finish(start(drawing, read, out, "1/2"))
    assert files(out) == files(tmp_path / "whole")


@pytest.mark.slow
def test_memory_does_not_grow_with_the_source(drawing, documents, tmp_path):
    """Ten chunks instead of one; all of their images and latents together would take 260 MB more."""
    peaks = []
    for records in (CHUNK, 10 * CHUNK):
        process = start(drawing, source(documents, tmp_path, records), tmp_path / f"out-{records}", side=SIDE)
        _, status, usage = os.wait4(process.pid, 0)
        assert os.waitstatus_to_exitcode(status) == 0, process.stderr.read()
        peaks.append(usage.ru_maxrss / 1024)
        process.returncode = 0
        process.stderr.close()
    print(f"peaks: {peaks[0]:.0f} and {peaks[1]:.0f} MB")
    assert peaks[1] - peaks[0] < 100, peaks
