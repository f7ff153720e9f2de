"""Fixtures that several folders of tests share."""

import fcntl
import gc
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from tests import array_types  # noqa: F401  (before the modules that it checks are imported)

# Set before jax is imported and inherited by the processes that tests start, so that every program is compiled once.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
# Tests compile programs that run once, so LLVM need not optimise them. Existing flags, even empty ones, are kept.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import hypothesis
import jax
import pytest

from emu_jax.config import load_config
from emu_jax.train.loop import train
from tests.buckets import _gcs, _s3, bucket, s3_bucket  # noqa: F401  (fixtures)
from tests.foreign import eva_clip, hugging_llama, meta_llama  # noqa: F401  (fixtures)
from tests.train import tiny

# No deadline, so that a busy machine fails no property test; the same examples in every run.
hypothesis.settings.register_profile("emu_jax", deadline=None, derandomize=True, database=None, max_examples=60)
hypothesis.settings.load_profile("emu_jax")


# Compiled programs are memory maps. Linux allows a process 65,530 of them; beyond that XLA crashes.
MANY_MAPS = 30_000


@pytest.fixture(scope="module", autouse=True)
def _few_programs() -> Iterator[None]:
    """Clears the caches of compiled programs when there are many."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MANY_MAPS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of the reference implementation's results; skips without it, or fails where CI requires it."""
    folder = Path(__file__).parents[2] / "shared" / "golden"
    if not (folder / "README.md").is_file():
        reason = f"golden files not found at {folder}: they are stored beside the project and are not shipped with it"
        if os.environ.get("EMU_JAX_REQUIRE_GOLDEN"):
            pytest.fail(reason)
        pytest.skip(reason)
    return folder


@pytest.fixture(scope="session")
def make_once(tmp_path_factory) -> Callable[[str, Callable[[Path], object]], Path]:
    """Makes a folder once for all workers of pytest-xdist: the first one that asks makes it, and the others wait."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent

    def once(name: str, make: Callable[[Path], object]) -> Path:
        folder, made = base / name, base / f"{name}.made"
        with (base / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not made.exists():
                shutil.rmtree(folder, ignore_errors=True)  # of a worker that failed to make it
                make(folder)
                made.touch()
        return folder

    return once


@pytest.fixture(scope="session")
def documents(make_once) -> Path:
    """A JSONL of small documents (`train/tiny.py`)."""
    return make_once("documents", tiny.draw) / tiny.DOCUMENTS


@pytest.fixture(scope="session")
def drawing(make_once, documents, trained) -> Path:
    """A copy of `trained` with a VAE and a decoder, trained for two steps each; tests must not change it."""

    def make(folder: Path) -> None:
        shutil.copytree(trained, folder / "run")
        tiny.train_decoder(folder / "run", documents)

    return make_once("drawing", make) / "run"


@pytest.fixture(scope="session")
def trained(make_once, documents) -> Path:
    """The work directory of two steps of `train/tiny.py`; tests must not change it."""
    config = load_config(tiny.__file__, [f"--config.data.source={documents}", "--config.train.steps=2"])
    return make_once("trained", lambda folder: train(config, folder / "run")) / "run"


@pytest.fixture(scope="session")
def instructed(make_once, documents, trained) -> Path:
    """The work directory of two steps of adapters on `trained`; tests must not change it."""
    config = tiny.instruct_config(documents, trained)
    return make_once("instructed", lambda folder: train(config, folder / "run")) / "run"
