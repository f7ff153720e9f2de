"""Fixtures that several folders of tests share."""

import gc
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from tests import array_types  # noqa: F401  (before the modules that it checks are imported)

# Set before jax is imported, and inherited by the processes that tests start: what one of them has compiled, none
# compiles again.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
# Most time goes into compiling what runs once: LLVM need not polish it. Flags that are set, even to nothing, stay.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import hypothesis
import jax
import pytest

from emu_jax.config import load_config
from emu_jax.train.loop import train
from tests.foreign import eva_clip, hugging_llama, meta_llama  # noqa: F401  (fixtures)
from tests.train import tiny

# A busy machine must not fail a property test, and the same code must always see the same examples.
hypothesis.settings.register_profile("emu_jax", deadline=None, derandomize=True, database=None, max_examples=60)
hypothesis.settings.load_profile("emu_jax")


# Compiled programs are memory maps, of which Linux gives a process 65,530: one more, and XLA crashes.
MANY_MAPS = 30_000


@pytest.fixture(scope="module", autouse=True)
def _few_programs() -> Iterator[None]:
    """Forgets what is compiled once there is much of it."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MANY_MAPS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of what the reference implementation computed; a skip without it, a failure where CI requires it."""
    folder = Path(__file__).parents[2] / "shared" / "golden"
    if not (folder / "README.md").is_file():
        reason = f"golden files not found at {folder}: they lie beside the project and are not shipped with it"
        if os.environ.get("EMU_JAX_REQUIRE_GOLDEN"):
            pytest.fail(reason)
        pytest.skip(reason)
    return folder


@pytest.fixture(scope="session")
def documents(tmp_path_factory) -> Path:
    """A JSONL of small documents (`train/tiny.py`)."""
    return tiny.draw(tmp_path_factory.mktemp("documents"))


@pytest.fixture(scope="session")
def drawing(tmp_path_factory, documents, trained) -> Path:
    """`trained` with a VAE and a decoder of two steps each beside it; tests must leave it as it is."""
    workdir = tmp_path_factory.mktemp("drawing") / "run"
    shutil.copytree(trained, workdir)
    tiny.train_decoder(workdir, documents)
    return workdir


@pytest.fixture(scope="session")
def trained(tmp_path_factory, documents) -> Path:
    """The work directory of two steps of `train/tiny.py`; tests must leave it as it is."""
    workdir = tmp_path_factory.mktemp("trained") / "run"
    train(load_config(tiny.__file__, [f"--config.data.source={documents}", "--config.train.steps=2"]), workdir)
    return workdir


@pytest.fixture(scope="session")
def instructed(tmp_path_factory, documents, trained) -> Path:
    """The work directory of two steps of adapters on `trained`; tests must leave it as it is."""
    workdir = tmp_path_factory.mktemp("instructed") / "run"
    train(tiny.instruct_config(documents, trained), workdir)
    return workdir
