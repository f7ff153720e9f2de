"""Type checkers see the class behind the lazy `from emu_jax import Emu`."""

from pathlib import Path

from mypy import api

PACKAGE = Path(__file__).parent.parent / "emu_jax"


def test_emu_has_a_type(tmp_path):
    """Other modules' imports are skipped, so that only these three files are checked."""
    file = tmp_path / "uses_emu.py"
    file.write_text('from emu_jax import Emu\nreveal_type(Emu)\nreveal_type(Emu.load("runs/quickstart"))\n')
    files = [file, PACKAGE / "__init__.py", PACKAGE / "generate/model.py"]
    options = ["--namespace-packages", "--explicit-package-bases", "--follow-imports=skip", "--config-file="]
    out, err, _ = api.run([*options, "--cache-dir", str(tmp_path / "cache"), *map(str, files)])
    revealed = [line for line in out.splitlines() if line.startswith(str(file))]
    assert "-> emu_jax.generate.model.Emu" in revealed[0], (out, err)
    assert 'Revealed type is "emu_jax.generate.model.Emu"' in revealed[1], (out, err)
