"""Executes docs/extend/*.md: the files of a page become an installed package, its commands run on tiny data.

A block with a path as its title is a file; "files" lists images. `pip install -e .` is replaced by the metadata that it
would install. Commands run in this process, in a folder of their own, with the sizes of `train/tiny.py`.
"""

from __future__ import annotations

import importlib
import inspect
import json
import shutil
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image as PIL

from configs import quickstart
from emu_jax import Emu
from emu_jax.cli import main
from tests.evaluate.people import TRAIN, people
from tests.models.heads import test_heads as suite
from tests.pages import ROOT, blocks, commands
from tests.train import tiny

PAGES = {page.stem: page.relative_to(ROOT) for page in sorted((ROOT / "docs" / "extend").glob("*.md"))}
PACKAGE = "my_emu"
LINES = 60


def changes(new: ConfigDict, old: ConfigDict, path: str = "--config") -> Iterator[str]:
    """The overrides that make one config of another."""
    for name, value in new.items():
        if isinstance(value, ConfigDict):
            yield from changes(value, old[name], f"{path}.{name}")
        elif value != old[name]:
            yield f"{path}.{name}={value}"


# Added to a page's command, by its first words, so that it takes seconds.
SHORT = ("--config.train.steps=2", "--config.train.minutes=0")
SMALL = [
    word for word in changes(tiny.get_config(), quickstart.get_config()) if not word.startswith("--config.data.source=")
]
TINY = (*SMALL, *SHORT)  # added after a page's own words, whose source stays
SMALL_VAE = ("--config.image_size=16", "--config.vae.block_channels=(8, 8)", "--config.vae.groups=4")
ADDED = {
    ("source", "prepare"): ("--image-size=16",),
    ("source", "train"): TINY,
    ("visual_head", "train"): (*TINY, "--config.tokenizer.vocab_size=400"),
    ("loss", "train"): (*TINY, "--config.tokenizer.vocab_size=400"),
    ("task", "train"): (*SMALL_VAE, "--config.data.batch=4", *SHORT),
}


@pytest.fixture
def stage(tmp_path, monkeypatch) -> Iterator[Path]:
    """The folder in which a page is followed; packages in it are found, and forgotten afterwards."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] == PACKAGE]:
        del sys.modules[name]


def follow(name: str, stage: Path) -> None:
    """Writes the files of a page, then runs its commands."""
    for block in blocks(PAGES[name]):
        if block.about == "files":
            for number, line in enumerate(block.text.splitlines()):
                (stage / line).parent.mkdir(parents=True, exist_ok=True)
                PIL.fromarray(people(TRAIN)[number].pixels).save(stage / line)
        elif block.about:
            (stage / block.about).parent.mkdir(parents=True, exist_ok=True)
            (stage / block.about).write_text(block.text + "\n", encoding="utf-8")
    for _, words in commands(PAGES[name]):
        if words[0] == "pip":
            install(stage)
        else:
            assert main([*words[1:], *ADDED.get((name, words[1]), ())]) == 0, words


def install(stage: Path) -> None:
    """What `pip install -e .` would leave for `importlib.metadata`."""
    project = tomllib.loads((stage / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    folder = stage / f"{project['name']}-{project['version']}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    groups = project["entry-points"].items()
    lines = [
        f"[{group}]\n" + "".join(f"{key} = {value}\n" for key, value in points.items()) for group, points in groups
    ]
    (folder / "entry_points.txt").write_text("\n".join(lines), encoding="utf-8")
    importlib.invalidate_caches()


def last_metrics(workdir: Path) -> dict[str, float]:
    return json.loads((workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])


@pytest.mark.parametrize("name", PAGES)
def test_pages_are_short(name):
    assert len((ROOT / PAGES[name]).read_text(encoding="utf-8").splitlines()) < LINES


@pytest.mark.long
def test_source(stage):
    follow("source", stage)
    manifest = json.loads((stage / "data" / "albums" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["splits"]["train"]["records"] == 2 and not manifest["rejects"]
    assert last_metrics(stage / "runs" / "albums")["text_loss"] > 0
    config = json.loads((stage / "runs" / "albums" / "config.json").read_text(encoding="utf-8"))
    assert config["data"]["source"] == "data/albums"


@pytest.mark.long
def test_benchmark(stage, trained):
    shutil.copytree(trained, stage / "runs" / "quickstart")
    follow("benchmark", stage)
    (scores,) = stage.rglob("colours-test-0shot/scores.json")
    figures = json.loads(scores.read_text(encoding="utf-8"))["figures"]
    assert figures["accuracy"]["count"] == 2


def test_sampler(stage, drawing):
    shutil.copytree(drawing, stage / "runs" / "quickstart")
    follow("sampler", stage)
    with PIL.open(stage / "fairy.png") as image:
        assert "trailing" in str(image.text)


def test_a_sampler_that_knows_the_noise_finds_the_image(stage):
    """The page's table is exact: with the true noise as every prediction, x is the image at the end."""
    from emu_jax.models.diffusion import Schedule

    for block in blocks(PAGES["sampler"]):
        if block.about == "my_emu/trailing.py":
            space: dict = {}
            exec(block.text, space)
    table, schedule = space["trailing"](Schedule(), 7), Schedule()
    assert table["timestep"][0] == schedule.train_steps - 1
    image, noise = 0.3, -1.2
    start = schedule.alphas_bar[table["timestep"][0]]
    x = start**0.5 * image + (1.0 - start) ** 0.5 * noise
    for row in range(7):
        x = table["x_coef"][row] * x + table["history_coef"][row, 0] * noise
    assert x == pytest.approx(image)


@pytest.mark.long
def test_loss(stage):
    PIL.fromarray(people(TRAIN)[0].pixels).save(stage / "dog.png")
    follow("loss", stage)
    metrics = last_metrics(stage / "runs" / "diverse")
    assert 0 < metrics["query_similarity"] < 1
    weight = json.loads((stage / "runs" / "diverse" / "config.json").read_text())["model"]["regression_loss_weight"]
    parts = metrics["text_loss"] + weight * metrics["regression_loss"]
    assert metrics["loss"] == pytest.approx(parts + 0.1 * metrics["query_similarity"], rel=1e-4)


@pytest.mark.long
def test_task(stage):
    follow("task", stage)
    assert last_metrics(stage / "runs" / "denoise")["squared_error"] > 0


@pytest.mark.long
def test_visual_head(stage):
    """Trained, and generates: the head is found again by the name in the checkpoint."""
    follow("visual_head", stage)
    assert last_metrics(stage / "runs" / "log_cosh")["regression_loss"] > 0
    model = Emu.load(stage / "runs" / "log_cosh")
    assert model.config.visual_head.name == "log_cosh" and model.config.visual_head.scale == 0.5
    assert np.isfinite(model.generate_embeddings([["a dog"]])).all()


@pytest.mark.long
@pytest.mark.parametrize(
    "check",
    [
        name
        for name in dir(suite)
        if name.startswith("test_") and "name" in inspect.signature(getattr(suite, name)).parameters
    ],
)
def test_a_head_of_another_package_passes_the_suite(stage, check):
    for block in blocks(PAGES["visual_head"]):
        if block.about:
            (stage / block.about).parent.mkdir(parents=True, exist_ok=True)
            (stage / block.about).write_text(block.text + "\n", encoding="utf-8")
    install(stage)
    getattr(suite, check)("log_cosh")
