"""configs/ablations: each builds at both sizes, and differs from its base in what it says and in nothing else."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from emu_jax.cli import main
from emu_jax.config import load_config, to_json
from emu_jax.errors import UserError
from emu_jax.evaluate.compare import differing
from emu_jax.evaluate.quickstart import captions
from emu_jax.generate.model import Emu
from emu_jax.models import emu
from emu_jax.models.flops import forward_flops
from emu_jax.models.paths import flatten
from emu_jax.train.loop import TrainConfig, train
from emu_jax.train.optimizer import OptimizerConfig
from tests.train import tiny

FOLDER = Path(__file__).parents[1] / "configs" / "ablations"
KIND, WEIGHT = "model.causal.kind", "model.regression_loss_weight"
STORYBOARD, QUERIES = "data.mixture.storyboard.weight", "model.causal.queries"
RATE, STEPS = "optimizer.learning_rate.vision", "train.steps"
STANDARDISE, STOP = "model.standardise", "model.stop_target_inputs"
ROWS_OF_32 = {QUERIES: (8, 32), "data.row_tokens": (96, 224), "model.llama.context": (256, 512)}
ROWS_OF_64 = {QUERIES: (8, 64), "data.row_tokens": (96, 394), "model.llama.context": (256, 512)}
HEADS = ("l1", "smooth_l1", "cosine", "infonce", "flow", "codes", "queries")  # beside l2
# Config:variant -> the fields that differ from the base's, with the base's value and its own.
DIFFERENCES = {
    "base:micro": {},
    "base:7b": {},
    "no_storyboards:micro": {STORYBOARD: (1, 0), STEPS: (2000, 1867)},
    "no_storyboards:micro-steps": {STORYBOARD: (1, 0)},
    "no_storyboards:7b": {STORYBOARD: (16, 0)},
    "no_regression:micro": {WEIGHT: (4.0, 0.0)},
    "no_regression:7b": {WEIGHT: (1.0, 0.0)},
    "no_causal_transformer:micro": {KIND: ("causal", "pooled")},
    "no_causal_transformer:7b": {KIND: ("causal", "pooled")},
    "bidirectional_queries:micro": {KIND: ("causal", "bidirectional")},
    "bidirectional_queries:7b": {KIND: ("causal", "bidirectional")},
    "queries:micro-32": ROWS_OF_32,
    "queries:micro-64": ROWS_OF_64,
    "queries:micro-32-compute": ROWS_OF_32 | {STEPS: (2000, 920)},
    "queries:micro-64-compute": ROWS_OF_64 | {STEPS: (2000, 507)},
    "queries:7b-8": {QUERIES: (32, 8)},
    "queries:7b-64": {QUERIES: (32, 64)},
    "frozen_vision:micro": {RATE: (1.2e-3, 0.0), "init.vision": ("", "runs/ablations/base-0")},
    "frozen_vision:micro-random": {RATE: (1.2e-3, 0.0)},
    "frozen_vision:7b": {RATE: (4e-5, 0.0)},
    "regression_weight:micro-1": {WEIGHT: (4.0, 1.0)},
    "regression_weight:micro-16": {WEIGHT: (4.0, 16.0)},
    "regression_weight:7b-0.25": {WEIGHT: (1.0, 0.25)},
    "regression_weight:7b-4": {WEIGHT: (1.0, 4.0)},
    "published_objective:micro": {
        WEIGHT: (4.0, 1.0),
        STANDARDISE: (True, False),
        STOP: (True, False),
        "data.predicted_share": (0.5, 1.0),
        "data.pairs.text_first_text_weight": (0.3, 1.0),
        "data.pairs.image_first_visual_weight": (0.0, 1.0),
        "init.vision": ("", "runs/ablations/base-0"),
    },
    "published_objective:micro-raw": {STANDARDISE: (True, False)},
    "published_objective:micro-live": {STOP: (True, False)},
} | {
    f"visual_head:{size}-{name}": {"model.visual_head.name": ("l2", name)} for size in ("micro", "7b") for name in HEADS
}
DIFFERENCES |= {f"visual_head:drawn-{name}": {"model.visual_head.name": ("l2", name)} for name in HEADS}
DIFFERENCES["visual_head:drawn-codes"] |= {"init.codebook": ("", "runs/heads/codebook")}


def load(name: str):
    file, variant = name.split(":")
    return load_config(f"{FOLDER / file}.py:{variant}")


@pytest.mark.parametrize("name", DIFFERENCES)
def test_differs_in_what_it_says(name):
    size = name.partition(":")[2].partition("-")[0]
    beside = "visual_head:drawn-l2" if size == "drawn" else f"base:{size}"
    ours, base = (
        {k.replace("/", "."): v for k, v in flatten(json.loads(to_json(load(n)))).items()} for n in (name, beside)
    )
    found = differing(base, ours)
    print(name, found)
    assert found == DIFFERENCES[name]


@pytest.mark.parametrize("name", DIFFERENCES)
def test_builds(name):
    """Its parameters, abstractly, of the size that the ablation says, and its training's settings."""
    config = load(name)
    TrainConfig.from_dict(config.train)
    config.model.llama.vocab_size = config.model.llama.vocab_size or 32_004
    model = emu.EmuConfig.from_dict(config.model)
    count = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(emu.abstract(model)))
    print(name, f"{count:,}")
    low, high = (7.7e9, 8.4e9) if ":7b" in name else (0.9e6, 11e6)
    assert low < count < high
    optimizer = OptimizerConfig.from_dict(config.optimizer)
    frozen = {"vision", "causal"} if "drawn" in name else {"vision"} if "frozen" in name else set()
    assert optimizer.frozen == frozen
    flops = forward_flops(model, 1, 1, config.data.row_tokens)
    assert flops.pop("adapters") == 0 and min(flops.values()) > 0
    assert config.data.row_tokens <= model.llama.context


def test_no_config_is_forgotten():
    assert {path.stem for path in FOLDER.glob("*.py")} == {name.split(":")[0] for name in DIFFERENCES}
    with pytest.raises(
        UserError,
        match=r"queries\.py:micro-7: no such variant; choose one of 7b-8, 7b-64, micro-32, micro-64, micro-32-",
    ):
        load("queries:micro-7")


@pytest.mark.parametrize("queries", [32, 64])
def test_equal_compute(queries):
    """Steps times FLOPs of a step are the base's, of 8 rows with 4 images each."""

    def flops(name):
        config = load(name)
        config.model.llama.vocab_size = 715
        rows = config.data.batch_rows
        step = forward_flops(emu.EmuConfig.from_dict(config.model), 4 * rows, rows, config.data.row_tokens)
        return config.train.steps * sum(step.values())

    ratio = flops(f"queries:micro-{queries}-compute") / flops("base:micro")
    assert abs(ratio - 1) < 0.01, ratio


@pytest.mark.slow
def test_a_run_without_a_causal_transformer(documents, tmp_path, capsys):
    """It trains, loads, generates and exports its language model; the published layout has no place for it."""
    words = [f"--config.data.source={documents}", "--config.train.steps=2", "--config.model.causal.kind=pooled"]
    workdir = tmp_path / "run"
    train(load_config(tiny.__file__, words), workdir)
    emu_model = Emu.load(workdir)
    capsys.readouterr()
    embeddings = emu_model.generate_embeddings([["a red bar"]])
    assert embeddings.shape == (1, 4, 16) and np.isfinite(embeddings).all()
    assert main(["export", "--from", str(workdir), "--to", str(tmp_path / "emu"), "--format", "emu"]) == 2
    assert capsys.readouterr().err == (
        f"emu-jax export: {workdir}: its model.causal.kind is pooled, and the published layout holds only causal; the "
        "format llama exports its language model\n"
    )
    assert not (tmp_path / "emu").exists()
    assert main(["export", "--from", str(workdir), "--to", str(tmp_path / "llama"), "--format", "llama"]) == 0


@pytest.mark.slow
def test_scores_of_some_splits_alone(trained):
    """The right image is looked for among all images, whichever split is scored; another one is refused."""
    model = Emu.load(trained)
    scores = captions.score(model, ["heldout_concepts"])
    assert {name.partition(":")[0] for name in scores.figures} == {"heldout_concepts"}
    assert {answer.split for answer in scores.answers} == {"heldout_concepts"}
    assert (len(scores.answers), scores.gallery) == (40, 3372)
    with pytest.raises(UserError, match=r"split 'test': no such split; choose among train, heldout"):
        captions.score(model, ["test"])
