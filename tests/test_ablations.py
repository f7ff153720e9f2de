"""configs/ablations: each builds at both sizes, and differs from its base in what it says and in nothing else."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from emu_jax.config import load_config, to_json
from emu_jax.errors import UserError
from emu_jax.evaluate.compare import differing
from emu_jax.models import emu
from emu_jax.models.paths import flatten
from emu_jax.train.optimizer import OptimizerConfig

FOLDER = Path(__file__).parents[1] / "configs" / "ablations"
KIND, WEIGHT = "model.causal.kind", "model.regression_loss_weight"
STORYBOARD, QUERIES = "data.mixture.storyboard.weight", "model.causal.queries"
RATE = "optimizer.learning_rate.vision"
# Config:variant -> the fields that differ from the base's, with the base's value and its own.
DIFFERENCES = {
    "base:mini": {},
    "base:7b": {},
    "no_storyboards:mini": {STORYBOARD: (16, 0)},
    "no_storyboards:7b": {STORYBOARD: (16, 0)},
    "no_regression:mini": {WEIGHT: (4.0, 0.0)},
    "no_regression:7b": {WEIGHT: (1.0, 0.0)},
    "no_causal_transformer:mini": {KIND: ("causal", "pooled")},
    "no_causal_transformer:7b": {KIND: ("causal", "pooled")},
    "bidirectional_queries:mini": {KIND: ("causal", "bidirectional")},
    "bidirectional_queries:7b": {KIND: ("causal", "bidirectional")},
    "queries:mini-32": {QUERIES: (8, 32), "data.row_tokens": (96, 224), "model.llama.context": (256, 512)},
    "queries:mini-64": {QUERIES: (8, 64), "data.row_tokens": (96, 394), "model.llama.context": (256, 512)},
    "queries:7b-8": {QUERIES: (32, 8)},
    "queries:7b-64": {QUERIES: (32, 64)},
    "frozen_vision:mini": {RATE: (1.2e-3, 0.0), "init.vision": ("", "runs/ablations/base-0")},
    "frozen_vision:mini-random": {RATE: (1.2e-3, 0.0)},
    "frozen_vision:7b": {RATE: (4e-5, 0.0)},
    "regression_weight:mini-1": {WEIGHT: (4.0, 1.0)},
    "regression_weight:mini-16": {WEIGHT: (4.0, 16.0)},
    "regression_weight:7b-0.25": {WEIGHT: (1.0, 0.25)},
    "regression_weight:7b-4": {WEIGHT: (1.0, 4.0)},
}


def load(name: str):
    file, variant = name.split(":")
    return load_config(f"{FOLDER / file}.py:{variant}")


@pytest.mark.parametrize("name", DIFFERENCES)
def test_differs_in_what_it_says(name):
    size = name.partition(":")[2].partition("-")[0]
    ours, base = (
        {k.replace("/", "."): v for k, v in flatten(json.loads(to_json(load(n)))).items()}
        for n in (name, f"base:{size}")
    )
    found = differing(base, ours)
    print(name, found)
    assert found == DIFFERENCES[name]


@pytest.mark.parametrize("name", DIFFERENCES)
def test_builds(name):
    """Its parameters, abstractly, of the size that the ablation says."""
    config = load(name)
    config.model.llama.vocab_size = config.model.llama.vocab_size or 32_004
    model = emu.EmuConfig.from_dict(config.model)
    count = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(emu.abstract(model)))
    print(name, f"{count:,}")
    low, high = (1.5e6, 11e6) if "mini" in name else (7.7e9, 8.0e9)
    assert low < count < high
    optimizer = OptimizerConfig.from_dict(config.optimizer)
    assert optimizer.frozen == (frozenset({"vision"}) if "frozen" in name else frozenset())
    assert min(emu.forward_flops(model, 1, 1, config.data.row_tokens).values()) > 0
    assert config.data.row_tokens <= model.llama.context


def test_no_config_is_forgotten():
    assert {path.stem for path in FOLDER.glob("*.py")} == {name.split(":")[0] for name in DIFFERENCES}
    with pytest.raises(
        UserError, match=r"queries\.py:mini-7: no such variant; choose one of 7b-8, 7b-64, mini-32, mini-64"
    ):
        load("queries:mini-7")
