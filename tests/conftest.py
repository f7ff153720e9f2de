"""Fixtures that several folders of tests share."""

import os
from pathlib import Path

import hypothesis
import pytest

# A busy machine must not fail a property test, and the same code must always see the same examples.
hypothesis.settings.register_profile("emu_jax", deadline=None, derandomize=True, database=None, max_examples=60)
hypothesis.settings.load_profile("emu_jax")


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
