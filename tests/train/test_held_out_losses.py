"""Losses of held-out data while a run trains."""

import json
import shutil

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from emu_jax.config import load_config
from emu_jax.data.config import DataConfig
from emu_jax.data.pipeline import Pipeline
from emu_jax.errors import UserError
from emu_jax.generate.model import Emu
from emu_jax.models import emu
from emu_jax.train.held_out_losses import EvalConfig
from emu_jax.train.loop import train
from emu_jax.workdir import read_metrics
from tests.train import line, tiny

LOSSES = ("held_out_loss", "held_out_text_loss", "held_out_regression_loss")


def small(documents, held_out, *more: str) -> ConfigDict:
    words = ["train.steps=4", "eval.every=2", "eval.batches=3", f"eval.source={held_out}", *more]
    return load_config(tiny.__file__, [f"--config.data.source={documents}", *(f"--config.{word}" for word in words)])


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    """Other documents: the first half of those that the run reads."""
    path = tiny.draw(tmp_path_factory.mktemp("held-out"))
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join(lines[: len(lines) // 2]) + "\n", encoding="utf-8")
    return path


@pytest.mark.long
@pytest.mark.parametrize("ema", [0.0, 0.5])
def test_they_are_those_of_the_saved_weights_without_dropout(documents, held_out, tmp_path, ema):
    """Recomputed from the checkpoint, batch by batch; the EMA's where the run keeps one."""
    config = small(documents, held_out, f"optimizer.ema_decay={ema}")
    train(config, tmp_path)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows if LOSSES[0] in row] == [2, 4]
    model = Emu.load(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())["data"]
    data = DataConfig.from_dict(ConfigDict(stored | {"source": str(held_out)}))
    fixed = {"queries": model.config.causal.queries, "image_size": model.config.vision.image_size}
    batches = Pipeline(data, model.tokenizer, **fixed, learn_image_token=model.config.learn_image_token)
    special = model.tokenizer
    ids = emu.SpecialIds(special.pad_id, special.img_id, special.img_end_id, special.image_id)
    found = []
    for _ in range(3):
        batch = emu.Batch(**next(batches))
        _, (metrics, _) = emu.loss(model.params, model.statistics, batch, config=model.config, ids=ids, train=False)
        found.append({name: float(metrics[name.removeprefix("held_out_")]) for name in LOSSES})
    for name in LOSSES:
        expected = np.mean([row[name] for row in found])
        assert rows[-1][name] == pytest.approx(expected, rel=1e-5), (name, expected)


def test_they_change_nothing_of_the_run(tmp_path):
    """Losses and parameters are bitwise those of a run without them, also where it resumes from its middle."""
    evaluated = ["eval.every=3", "eval.split=other"]
    found = {}
    for name, words in {"without": [], "with": evaluated, "resumed": evaluated}.items():
        if name == "resumed":
            shutil.copytree(tmp_path / "with", tmp_path / name)
            shutil.rmtree(tmp_path / name / "checkpoints" / "8")
        config = load_config(line.__file__, [f"--config.{word}" for word in ["train.steps=8", *words]])
        state = train(config, tmp_path / name)
        rows = read_metrics(tmp_path / name / "metrics.jsonl")
        found[name] = jax.tree.map(np.asarray, state.params), [row["loss"] for row in rows], rows
    for name in ("with", "resumed"):
        jax.tree.map(np.testing.assert_array_equal, found[name][0], found["without"][0])
        assert found[name][1] == found["without"][1]
    held_out = {
        name: {row["step"]: row["held_out_loss"] for row in rows if "held_out_loss" in row}
        for name, (_, _, rows) in found.items()
    }
    assert held_out["without"] == {} and list(held_out["with"]) == [3, 6, 8]
    assert held_out["resumed"] == held_out["with"]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"every": -1}, "config.eval.every=-1; expected at least 0"),
        ({"batches": 0}, "config.eval.batches=0; expected at least 1"),
        ({"every": 5}, "config.eval.every=5: the run's own data would be evaluated; set config.eval.split, source or"),
        ({"evry": 5}, "config.eval.evry"),
    ],
)
def test_what_cannot_be(fields, said):
    with pytest.raises(UserError) as raised:
        EvalConfig.of(ConfigDict({"eval": fields}))
    assert said in str(raised.value), said


def test_which_data_are_held_out():
    mixture = {"a": {"source": "data/a", "split": "train"}, "b": {"source": "data/b", "split": "train"}}
    data = ConfigDict({"source": "", "split": "train", "mixture": mixture, "max_padding": 0.2, "workers": 4})
    split = EvalConfig(every=1, split="test").data(data)
    assert [entry.split for entry in split.mixture.values()] == ["test", "test"] and split.workers == 0
    own = EvalConfig(every=1, source="data/c", split="test").data(data)
    assert (own.source, own.split, len(own.mixture)) == ("data/c", "test", 0)
    assert data.mixture.a.split == "train" and data.workers == 4, "the run's own stay as they are"
