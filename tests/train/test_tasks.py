"""Tasks: the registry, a task of a user's own, and configs that are resolved without being changed."""

import importlib.metadata
import json
import re
import sys
import types
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import vae
from emu_jax.data.examples import ExamplePipeline, ExamplesConfig, Images
from emu_jax.errors import UserError
from emu_jax.inspect.data import inspect
from emu_jax.plan.steps import planned_task
from emu_jax.train.loop import train
from emu_jax.train.optimizer import OptimizerConfig
from emu_jax.train.tasks.pretrain import Pretrain
from emu_jax.train.tasks.task import TASKS, Inputs, Task, find_task, make_task, trainable_paths
from emu_jax.workdir import read_metrics
from tests.train import tiny


class MeanColour(Task):
    """A task of a user's own: learns the mean colour of images."""

    holds = "colour"
    plots: ClassVar = {"losses": ("squared_error",)}
    row_name = "images"
    summed = frozenset({"loss", "squared_error"})

    def __init__(self, config, inputs=None):
        self.config, self.rows = config, config.data.batch
        self.logical_axes = {"colour": {"mean": (None,)}}
        self.shapes = {"colour": {"mean": jax.ShapeDtypeStruct((3,), jnp.float32)}}
        optimizer = OptimizerConfig.from_dict(config.optimizer)
        self.trainable = trainable_paths(self.logical_axes, self.shapes, optimizer)

    @classmethod
    def open(cls, config, own):
        data = ExamplesConfig.from_dict(config.data)
        stream = ExamplePipeline(Images(data.source, data.split, config.image_size), data, own=own(data.batch))
        return Inputs(config.copy_and_resolve_references(), stream)

    def init(self, key):
        return {"colour": {"mean": jnp.zeros(3)}}, {}

    def normalisers(self, batch):
        return jnp.asarray(float(len(batch["pixels"])))

    def loss(self, params, statistics, batch, key, count):
        colours = batch["pixels"].astype(jnp.float32).mean((1, 2)) / 255.0  # [B, 3]
        loss = jnp.square(colours - params["colour"]["mean"]).sum() / count
        return loss, ({"loss": loss, "squared_error": loss}, statistics)


def test_a_task_of_ones_own_is_trained(documents, tmp_path, monkeypatch):
    config = tiny.vae_config(tiny.pairs(documents))
    monkeypatch.setitem(sys.modules, "mine", types.SimpleNamespace(MeanColour=MeanColour))
    config.objective = "mine:MeanColour"
    config.optimizer.learning_rate = ConfigDict({"colour": 0.1})
    config.train.steps = 4
    train(config, tmp_path / "run")
    losses = [row["squared_error"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert len(losses) == 4 and losses[-1] < losses[0]
    assert (tmp_path / "run" / "plots" / "losses.png").exists()
    with pytest.raises(UserError, match=r"cannot be planned"):
        planned_task(config)


def test_an_entry_point_adds_a_name(monkeypatch):
    added = importlib.metadata.EntryPoint("mine", "emu_jax.train.tasks.pretrain:Pretrain", "emu_jax.tasks")
    entries = importlib.metadata.EntryPoints([added])
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: entries.select(group=group))
    assert find_task("mine") is Pretrain
    with pytest.raises(UserError, match=r"config\.objective='mini' is unknown; did you mean mine\?"):
        find_task("mini")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("pretrian", "config.objective='pretrian' is unknown; did you mean pretrain?"),
        (None, f"config.objective=None is unknown; did you mean {' | '.join(sorted(TASKS))}?"),
        ("nowhere.at_all:X", "config.objective=nowhere.at_all:X: cannot be imported (ModuleNotFoundError: No module"),
        ("json:Task", "config.objective=json:Task: cannot be imported (AttributeError: module 'json' has no"),
        (":", "config.objective=:: cannot be imported (ValueError: Empty module name"),
    ],
)
def test_tasks_that_are_not_there(name, expected):
    with pytest.raises(UserError, match=re.escape(expected)) as error:
        find_task(name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", TASKS)
def test_every_task_has_what_the_protocol_asks(name):
    kind = find_task(name)
    assert Task in kind.__mro__ and kind.holds in ("emu", "codebook", "vae", "unet") and kind.plots["losses"]


def test_a_config_is_resolved_into_a_new_one(documents):
    config = tiny.get_config()
    config.data.update({"source": str(documents), "row_images": 0, "batch_rows": 0, "batch_samples": 24})
    before = config.to_json()
    task, inputs = make_task(config)
    inputs.stream.close()
    assert config.to_json() == before
    assert task.config is inputs.config
    sizes = json.loads(inputs.config.to_json())
    assert min(sizes["data"]["row_images"], sizes["data"]["batch_rows"], sizes["model"]["llama"]["vocab_size"]) > 0
    assert task.rows == sizes["data"]["batch_rows"]


def test_batches_have_the_shapes_that_are_planned(documents):
    """Of a task on documents; the stream of one source has no others' numbers."""
    config = tiny.get_config()
    config.data.source = str(documents)
    task, inputs = make_task(config)
    batch = next(inputs.stream)
    inputs.stream.close()
    assert {name: (array.shape, np.dtype(array.dtype)) for name, array in batch.items()} == {
        name: (shape.shape, shape.dtype) for name, shape in task.batch_shapes().items()
    }


def test_what_packs_no_documents_is_not_inspected():
    with pytest.raises(UserError, match=r"config\.objective='vae': inspect-data shows packed documents"):
        inspect(vae.get_config(), None, rows=1, batches=1, verify=False)
