"""Work directories in odd places: names, links, without `$HOME`, on a file system that is read-only."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from emu_jax.checkpoints.store import newest_folder, read_meta
from tests.train import tiny
from tests.train.test_resume import ROOT

pytestmark = pytest.mark.slow


def run(workdir: str, documents: Path, cwd: Path, **variables: str | None) -> subprocess.CompletedProcess:
    """Two steps, named from `cwd`; a variable of None is removed from the environment."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | variables
    environment = {name: value for name, value in environment.items() if value is not None}
    words = ["train", "--config", tiny.__file__, "--workdir", workdir, f"--config.data.source={documents}"]
    return subprocess.run(
        [sys.executable, "-m", "emu_jax.cli", *words, "--config.train.steps=2"],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    "place", ["a folder with spaces/run", "größe/漢字/🎨", "link/run", "../above", "-run", "run.d/"]
)
def test_a_run_is_the_same_wherever_it_is(trained, documents, tmp_path, place):
    here = tmp_path / "here"
    (here / "behind").mkdir(parents=True)
    (here / "link").symlink_to(here / "behind", target_is_directory=True)
    word = f"./{place}" if place.startswith("-") else place
    done = run(word, documents, here)
    assert done.returncode == 0, done.stderr[-2000:]
    assert read_meta(newest_folder(here / place))["digests"] == read_meta(newest_folder(trained))["digests"]
    assert run(word, documents, here).returncode == 0, "the same command again has nothing left to do"


@pytest.mark.parametrize("variables", [{"HOME": None}, {"HOME": "/nonexistent"}, {"HOME": "/proc"}, {"LC_ALL": "C"}])
def test_a_run_needs_no_home(trained, documents, tmp_path, variables):
    done = run("run", documents, tmp_path, XDG_CACHE_HOME=None, MPLCONFIGDIR=None, **variables)
    assert done.returncode == 0, done.stderr[-2000:]
    assert read_meta(newest_folder(tmp_path / "run"))["digests"] == read_meta(newest_folder(trained))["digests"]


def test_a_read_only_file_system_is_one_line_before_and_behind_a_run(trained, documents, tmp_path):
    """Mounted over a new folder, and over a run that is to resume: nothing is lost."""
    if os.geteuid():
        pytest.skip("only root may mount")
    place = tmp_path / "place"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", place], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,ro", place], check=True)
        done = run(str(place / "run"), documents, tmp_path)
        assert done.returncode == 2
        assert done.stderr == (
            f"emu-jax train: workdir={place / 'run'}: nothing can be written in {place} (Read-only file system); name "
            "a folder where you may write\n"
        )
        subprocess.run(["mount", "-o", "remount,rw", place], check=True)
        assert run(str(place / "run"), documents, tmp_path).returncode == 0
        before = read_meta(newest_folder(place / "run"))
        subprocess.run(["mount", "-o", "remount,ro", place], check=True)
        done = run(str(place / "run"), documents, tmp_path)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and "Read-only file system" in done.stderr
        subprocess.run(["mount", "-o", "remount,rw", place], check=True)
        assert read_meta(newest_folder(place / "run")) == before
        assert run(str(place / "run"), documents, tmp_path).returncode == 0
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)
