"""Compiled programs in the user's cache (`cli/options.py`)."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
ASK = """import jax
from emu_jax.cli import options
{}
options.use_users_cache()
print(jax.config.jax_compilation_cache_dir)
"""


def ask(before: str = "pass", **variables: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    environment |= {"PYTHONPATH": str(ROOT), **variables}
    done = subprocess.run([sys.executable, "-c", ASK.format(before)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_it_is_a_folder_of_this_processor(tmp_path):
    folder = Path(ask(XDG_CACHE_HOME=str(tmp_path)))
    assert folder.parent == tmp_path / "emu_jax" / "programs" and folder.is_dir()
    assert len(folder.name) == 12 and int(folder.name, 16) >= 0
    assert (
        Path(ask(XDG_CACHE_HOME="", HOME=str(tmp_path))) == tmp_path / ".cache" / "emu_jax" / "programs" / folder.name
    )


def test_another_cache_or_none(tmp_path):
    assert ask(JAX_COMPILATION_CACHE_DIR=str(tmp_path)) == str(tmp_path)
    (tmp_path / "file").write_text("")
    assert ask(XDG_CACHE_HOME=str(tmp_path / "file")) == "None", "a cache that cannot be written stops no command"


def test_a_large_one_is_emptied(tmp_path):
    folder = Path(ask(XDG_CACHE_HOME=str(tmp_path)))
    (folder / "program-cache").write_bytes(b"x" * 1000)
    ask(XDG_CACHE_HOME=str(tmp_path))
    assert (folder / "program-cache").exists()
    ask("options.PROGRAMS = 999", XDG_CACHE_HOME=str(tmp_path))
    assert not list(folder.iterdir())
