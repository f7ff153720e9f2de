"""The examples in docstrings, run as doctests: of every module that has some, and of no other, so that none is imported
whose libraries are extras."""

import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in (ROOT / "emu_jax").rglob("*.py")
    if ">>> " in path.read_text(encoding="utf-8")
)


def test_there_are_examples():
    assert {"emu_jax.config", "emu_jax.data.tokenizer", "emu_jax.generate.samplers"} <= set(MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_examples(name, monkeypatch):
    monkeypatch.chdir(ROOT)  # examples name configs/…
    failed, attempted = doctest.testmod(importlib.import_module(name))
    assert attempted and not failed
