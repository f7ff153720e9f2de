"""launch/locks: one version of all that setup.py installs on a pod; launch/lock.sh: the commands it prints."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
PYTHONS = ("3.11", "3.12", "3.13")
# setuptools brings distutils where Python has none.
SETUP = """
import json, setuptools, distutils.core
package = distutils.core.run_setup("setup.py", stop_after="init")
print(json.dumps([package.install_requires, package.extras_require]))
"""


def lock(python: str) -> Path:
    return ROOT / "launch" / "locks" / f"py{python.replace('.', '')}.txt"


def pins(python: str) -> dict[str, str]:
    """Name -> version. A line is such a pair and says what needs it: no options, no addresses."""
    lines = [line for line in lock(python).read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    pairs = [re.fullmatch(r"([a-z0-9-]+)==([a-z0-9.]+) +# via [^:/]+", line) for line in lines]
    assert None not in pairs, lines[pairs.index(None)]
    return {pair[1]: pair[2] for pair in pairs if pair}


@pytest.fixture(scope="module")
def requirements() -> list[Requirement]:
    """What setup.py installs on a pod, whatever its job."""
    done = subprocess.run([sys.executable, "-c", SETUP], cwd=ROOT, capture_output=True, text=True, check=True)
    always, extras = json.loads(done.stdout.splitlines()[-1])
    return [Requirement(text) for text in sum((extras[name] for name in ("tpu", "gcs", "s3", "eval")), always)]


@pytest.mark.parametrize("python", PYTHONS)
def test_what_setup_asks_for_is_pinned(python, requirements):
    versions = pins(python)
    wanted = [each for each in requirements if not each.marker or each.marker.evaluate({"python_version": python})]
    names = [each.name.lower().replace("_", "-") for each in wanted]
    missing = [
        str(each)
        for name, each in zip(names, wanted, strict=True)
        if name not in versions or versions[name] not in each.specifier
    ]
    assert missing == [], f"run launch/lock.sh: {lock(python).name} does not have them"
    assert {"jaxlib", "libtpu"} <= set(versions)
    assert "torch" not in versions  # 2 GB that no pod needs


def test_the_container_has_a_lock():
    """Of its Python, and no other."""
    text = (ROOT / "launch" / "Dockerfile").read_text(encoding="utf-8")
    (python,) = re.findall(r"^FROM python:([0-9.]+)-slim$", text, re.MULTILINE)
    assert set(re.findall(r"launch/locks/\S+\.txt", text)) == {str(lock(python).relative_to(ROOT))}


def test_commands():
    command = [ROOT / "launch" / "lock.sh", "--dry-run", "--upgrade-package", "jax"]
    done = subprocess.run(command, cwd=ROOT.parent, capture_output=True, text=True, check=True)
    folder = re.search(r"^python -m venv (\S+)$", done.stdout, re.MULTILINE)
    assert folder and not Path(folder[1]).exists()
    extras = "--extra tpu --extra gcs --extra s3 --extra eval"
    assert done.stdout.replace(folder[1], "FOLDER").splitlines() == [
        "source launch/environment.sh",
        "python -m venv FOLDER",
        "FOLDER/bin/pip install --quiet uv",
        *(
            f"FOLDER/bin/uv pip compile --quiet setup.py {extras} --python-version {python} "
            "--python-platform x86_64-manylinux_2_35 --no-emit-index-url --annotation-style line "
            f"--custom-compile-command launch/lock.sh --output-file {lock(python).relative_to(ROOT)} "
            "--upgrade-package jax"
            for python in PYTHONS
        ),
    ]


def test_a_python_without_a_lock(tmp_path):
    (tmp_path / "launch").mkdir()
    shutil.copy(ROOT / "launch" / "environment.sh", tmp_path / "launch")
    line = "source launch/environment.sh; install_emu_jax '.[tpu]' pinned"
    env = os.environ | {"VIRTUAL_ENV": sys.prefix, "PATH": f"{sys.prefix}/bin{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True, env=env)
    name = f"launch/locks/py{sys.version_info[0]}{sys.version_info[1]}.txt"
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith(f"{name}: no such file; expected a Python of launch/lock.sh")


@pytest.mark.slow
@pytest.mark.parametrize("python", PYTHONS)
def test_it_installs(python, tmp_path):
    """In a new environment of that Python, as far as pip needs to look to know what it would install."""
    program = f"python{python}"
    if subprocess.run([program, "-c", ""], capture_output=True, check=False).returncode:
        pytest.skip(f"{program} is not here")
    subprocess.run([program, "-m", "venv", tmp_path / "venv"], check=True)
    report = tmp_path / "report.json"
    options = ["--quiet", "--dry-run", "--report", report, "--constraint", lock(python)]
    command = [tmp_path / "venv" / "bin" / "pip", "install", *options, "-e", f"{ROOT}[tpu,gcs,s3,eval]"]
    subprocess.run(command, check=True, cwd=tmp_path)
    found = [item["metadata"] for item in json.loads(report.read_text())["install"]]
    installed = {re.sub(r"[-_.]+", "-", each["name"]).lower(): each["version"] for each in found}
    assert installed.pop("emu-jax")
    assert installed == pins(python)


@pytest.mark.slow
def test_the_lowest_versions_that_setup_allows_work(tmp_path):
    """A machine that has older packages already, which satisfy setup.py: it trains, saves, loads and generates."""
    for name in ("emu_jax", "configs"):
        shutil.copytree(ROOT / name, tmp_path / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / "source")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*command: object) -> str:
        done = subprocess.run([*map(str, command)], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run(sys.executable, "-m", "venv", "lowest")
    python = tmp_path / "lowest" / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "uv")
    uv = tmp_path / "lowest" / "bin" / "uv"
    run(uv, "pip", "install", "--quiet", "--python", python, "--resolution", "lowest-direct", tmp_path / "source")
    steps = ("--config.train.steps=4", "--config.train.minutes=0")
    command = tmp_path / "lowest" / "bin" / "emu-jax"
    run(command, "train", "--config", "configs/quickstart.py", "--workdir", "run", *steps)
    run(command, "generate", "--model", "run", "--prompt", "cat", "--max-new-tokens", "4")
