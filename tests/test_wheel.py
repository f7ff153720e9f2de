"""The wheel: what is in it, that it works from an empty folder, and that every Python runs the model in it."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from PIL import Image as PIL

from emu_jax.data.fluent_emoji import examples

ROOT = Path(__file__).parents[1]
PARTS = ("emu_jax", "configs", "setup.py", "pyproject.toml", "README.md", "LICENSE")


def run(*command: str | Path, folder: Path) -> str:
    """Runs a command in a folder, with nothing of the checkout on its path; its standard output."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of this checkout, built without a network from a copy: `build/` would leave old files in the next."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in PARTS:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            shutil.copy(ROOT / name, source / name)
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--disable-pip-version-check")
    run(sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", out, source, folder=out)
    (found,) = out.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The commands' folder of an environment of its own, which sees this one's libraries but not the checkout."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    own = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", folder=folder).strip())
    # A line of a .pth file adds a folder, but not what that folder's own .pth files add, such as an editable checkout.
    libraries = {sysconfig.get_path(name) for name in ("purelib", "platlib")}
    (own / "libraries.pth").write_text("\n".join(sorted(libraries)) + "\n", encoding="utf-8")
    options = ("--no-deps", "--no-index", "--quiet", "--disable-pip-version-check", "--ignore-installed")
    run(sys.executable, "-m", "pip", "--python", python, "install", *options, wheel, folder=folder)
    return folder / "bin"


def test_what_is_in_it(wheel):
    """Every module, the embedded images with their licences, every config, and the mark that types are shipped."""
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "emu_jax").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    expected |= {f"emu_jax/shipped/{path.relative_to(ROOT)}" for path in (ROOT / "configs").rglob("*.py")}
    assert "emu_jax/py.typed" in expected and "emu_jax/data/assets/fluent_emoji/LICENSE-fluent-emoji.txt" in expected
    assert expected - names == set()
    assert not [name for name in names if name.startswith(("configs/", "tests/", "launch/"))]


def interpreter(version: str) -> str | None:
    """A Python of this version that makes environments: on the PATH, or one of pyenv's."""
    found = [shutil.which(f"python{version}")]
    if pyenv := shutil.which("pyenv"):
        names = subprocess.run(
            [pyenv, "versions", "--bare"], capture_output=True, text=True, check=False
        ).stdout.split()
        own = [name for name in names if name.startswith(f"{version}.")]
        found += [subprocess.run([pyenv, "prefix", n], capture_output=True, text=True).stdout.strip() for n in own]
        found = [f"{path}/bin/python" if path and Path(path).is_dir() else path for path in found]
    check = f"import sys, venv, ensurepip; assert sys.version.startswith('{version}.')"
    for path in filter(None, found):
        if subprocess.run([path, "-c", check], capture_output=True, check=False).returncode == 0:
            return path
    return None


# What an environment has before, by its Python: nothing, or what Colab's has and TensorFlow keeps.
PRESENT = {"3.11": (), "3.12": ("protobuf==5.29.5",), "3.13": ()}


@pytest.mark.long
@pytest.mark.parametrize("version", PRESENT)
def test_every_python_runs_the_box(version, wheel, tmp_path):
    """An environment with the newest packages that this Python takes beside those that are `PRESENT`."""
    python = interpreter(version)
    if python is None:
        pytest.skip(f"no Python {version} on this machine")
    run(python, "-m", "venv", "environment", folder=tmp_path)
    command = tmp_path / "environment" / "bin" / "emu-jax"
    pip = (tmp_path / "environment" / "bin" / "python", "-m", "pip", "--quiet", "--disable-pip-version-check")
    run(*pip, "install", wheel, *PRESENT[version], folder=tmp_path)
    example = examples("heldout_combinations", 128)[0]
    PIL.fromarray(example.pixels).save(tmp_path / "image.png")
    box = ("--model", "emu-mini")
    caption = run(command, "generate", *box, "--prompt", "image.png", folder=tmp_path).strip()
    answer = run(command, "chat", *box, "--image", "image.png", "--message", "what is this?", folder=tmp_path).strip()
    print(packages := run(*pip, "freeze", folder=tmp_path))
    assert all(package in packages.split() for package in PRESENT[version])
    assert example.role in caption and example.role in answer, (caption, answer, example.caption)
    run(command, "generate", *box, "--prompt", example.caption, "--out", "drawing.png", folder=tmp_path)
    assert PIL.open(tmp_path / "drawing.png").size == (64, 64)


@pytest.mark.long
def test_it_works_from_an_empty_folder(installed, tmp_path):
    imported = run(installed / "python", "-c", "import emu_jax; print(emu_jax.__file__)", folder=tmp_path)
    assert Path(imported).is_relative_to(installed.parent)
    settings = ("--config.train.steps=4", "--config.train.minutes=0", "--config.data.batch_rows=2")
    run(
        installed / "emu-jax",
        "train",
        "--config",
        "configs/quickstart.py",
        "--workdir",
        "run",
        *settings,
        folder=tmp_path,
    )
    pixels = examples("heldout_concepts", 64)[0].pixels
    PIL.fromarray(pixels).save(tmp_path / "image.png")
    run(installed / "emu-jax", "generate", "--model", "run", "--prompt", "image.png", folder=tmp_path)
    assert "14.182 B parameters" in run(
        installed / "emu-jax", "inspect", "--config", "configs/models.py:14b", folder=tmp_path
    )
    # A config of the user's own may begin with a shipped one.
    (tmp_path / "mine.py").write_text(
        "from configs import quickstart\n\n\ndef get_config():\n    return quickstart.get_config()\n", encoding="utf-8"
    )
    assert "parameters" in run(
        installed / "emu-jax", "inspect", "--config", "mine.py", "--config.model.llama.vocab_size=64", folder=tmp_path
    )
