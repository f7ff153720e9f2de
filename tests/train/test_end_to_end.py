"""Emu through its decoder's loss: who learns, what is drawn, and a run from training to drawing."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from emu_jax import Emu
from emu_jax.checkpoints.load import LoadedVAE, load_part
from emu_jax.cli import main
from emu_jax.config import load_config
from emu_jax.errors import UserError
from emu_jax.models import emu
from emu_jax.models.paths import flatten
from emu_jax.train.loop import train
from emu_jax.train.tasks.end_to_end import EndToEnd
from emu_jax.train.tasks.task import make_task
from tests.models.test_emu import CONFIG, IDS, IMAGE_TOKENS, PARAMS, QUERIES, make_batch, random_images
from tests.pages import ROOT
from tests.train import tiny

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def vae(documents, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("end_to_end") / "vae"
    train(tiny.vae_config(tiny.pairs(documents)), workdir)
    return workdir


def config_of(documents, vae, *overrides: str) -> ConfigDict:
    """Four steps of the tiny Emu with a U-Net of one resolution, which compiles soonest."""
    config = load_config("configs/end_to_end.py", [])
    small = load_config(tiny.__file__, [])
    for group in ("model", "tokenizer", "data", "train"):
        config[group] = small[group]
    config.unet.update({"block_channels": (8,), "attention_blocks": (True,), "heads": 2, "groups": 4})
    config.data.source = str(documents)
    config.init.vae = str(vae)
    config.train.update({"steps": 4, "checkpoint_every": 2})
    for override in overrides:
        path, value = override.split("=")
        *groups, field = path.split(".")
        node = config
        for group in groups:
            node = node[group]
        node[field] = type(node[field])(value)
    return config


@pytest.fixture(scope="module")
def run(documents, vae, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("end_to_end") / "run"
    train(config_of(documents, vae), workdir)
    return workdir


def params_of(workdir) -> dict[str, np.ndarray]:
    return {path: np.asarray(leaf) for path, leaf in flatten(Emu.load(workdir).params).items()}


def test_a_run_draws_with_its_own_decoder(run, vae, tmp_path):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(row["noise_error"]) and row["grad_norm/unet"] > 0 for row in rows)
    model = Emu.load(run)
    assert model.decoder is not None and model.decoder.size == 16
    image = model.generate_images([["a red bar"]], seeds=[1])[0].image
    assert image.size == (16, 16)
    apart = Emu.load(run, decoder=run)
    np.testing.assert_array_equal(np.asarray(apart.generate_images([["a red bar"]], seeds=[1])[0].image), image)
    # The VAE is the one that was named, bit for bit.
    theirs, ours = load_part(vae, LoadedVAE), load_part(run, LoadedVAE)
    assert ours.config == theirs.config
    jax.tree.map(np.testing.assert_array_equal, ours.params, theirs.params)


def test_a_resumed_run_ends_with_the_same_bits(run, documents, vae, tmp_path):
    copy = shutil.copytree(run, tmp_path / "copy")
    shutil.rmtree(copy / "checkpoints" / "4")
    train(config_of(documents, vae), copy)
    expected, found = params_of(run), params_of(copy)
    assert not [path for path, leaf in expected.items() if not np.array_equal(leaf, found[path])]
    unets = [Emu.load(path).decoder.unet_params for path in (run, copy)]
    jax.tree.map(np.testing.assert_array_equal, *unets)


def test_its_emu_is_exported(run, tmp_path):
    assert main(["export", "--from", str(run), "--to", str(tmp_path / "out"), "--format", "packed"]) == 0
    one, other = Emu.load(run), Emu.load(tmp_path / "out")
    np.testing.assert_allclose(
        other.generate_embeddings([["a red bar"]]), one.generate_embeddings([["a red bar"]]), atol=5e-2
    )


def test_a_frozen_decoder_stays_and_the_embeddings_learn_from_it(run, documents, vae, tmp_path):
    """Without the regression loss, the head's only gradient is the decoder's."""
    overrides = ["optimizer.learning_rate.unet=0", "model.regression_loss_weight=0", f"init.unet={run}"]
    train(config_of(documents, vae, *overrides), tmp_path / "run")
    before, after = Emu.load(run), Emu.load(tmp_path / "run")
    jax.tree.map(np.testing.assert_array_equal, after.decoder.unet_params, before.decoder.unet_params)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(row["regression_loss"] == 0 and row["noise_error"] > 0 for row in rows)
    fresh = emu.init(after.config, jax.random.key(0))["llama"]["visual_head"]["kernel"]
    assert np.abs(np.asarray(after.params["llama"]["visual_head"]["kernel"]) - np.asarray(fresh)).max() > 1e-5


def test_predicted_images_are_the_head_s_outputs_one_position_before():
    document = [1, 5, *IMAGE_TOKENS, 7, *IMAGE_TOKENS, 2]
    batch = make_batch([[document], [[1, 9, 9, 2]]], random_images(4).reshape(2, 2, *random_images(1).shape[1:]), 24)
    batch.visual_weights = jnp.where(jnp.arange(24) < 10, batch.visual_weights, 0.0)  # the second image is read
    model = emu.bind(CONFIG, PARAMS)
    hidden = jax.random.normal(jax.random.key(0), (2, 24, CONFIG.llama.width))
    found, here = emu.predicted_images(model, hidden, batch, IDS)
    np.testing.assert_array_equal(here, [[True, False], [False, False]])
    expected = model.llama.visual_head(hidden[0, 2 : 2 + QUERIES])  # [IMG] is at 2, its first <image> at 3
    np.testing.assert_allclose(found[0, 0], expected, rtol=1e-6)


@pytest.mark.slow
def test_eight_devices_compute_what_one_does(documents, vae, tmp_path):
    """Losses and norms of three steps over data 2 x fsdp 2 x tensor 2."""
    found = []
    for count in (1, 8):
        flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={count}"
        code = f"from tests.train import test_end_to_end as t; t.train_on({count}, {str(documents)!r}, {str(vae)!r}, "
        code += f"{str(tmp_path / str(count))!r})"
        environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found.append([json.loads(line) for line in (tmp_path / str(count) / "metrics.jsonl").read_text().splitlines()])
    for one, eight in zip(*found, strict=True):
        for name in ("loss", "text_loss", "regression_loss", "noise_error", "grad_norm/llama", "grad_norm/unet"):
            print(f"{name}: {eight[name]:.7g}, on one device {one[name]:.7g}")
            assert eight[name] == pytest.approx(one[name], rel=1e-4)


def train_on(count: int, documents: str, vae: str, workdir: str) -> None:
    config = config_of(documents, vae, "train.steps=3")
    config.model.standardise = False  # a batch's statistics differ in the last bits, which standardising enlarges
    if count > 1:
        config.train.mesh.update({"data": 2, "fsdp": 2, "tensor": 2})
    train(config, Path(workdir))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("model.visual_head.name=flow",), r"visual_head\.name=flow: its samples have no gradient"),
        (("drawing_loss.weight=-1",), r"config\.drawing_loss\.weight=-1\.0; expected 0 or more"),
        (("init.vae=",), r"config\.init\.vae is empty: the latents that the U-Net draws need a VAE"),
        (
            ("unet.condition_dim=7",),
            r"config\.unet\.condition_dim=7, but the VAE and the model have 16",
        ),
    ],
)
def test_what_cannot_work_is_refused(overrides, said, documents, vae, tmp_path):
    with pytest.raises(UserError, match=said):
        train(config_of(documents, vae, *overrides), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_flops_hold_the_decoder_s(documents, vae):
    task, _ = make_task(config_of(documents, vae))
    frozen, _ = make_task(config_of(documents, vae, "optimizer.learning_rate.unet=0"))
    planned = EndToEnd(EndToEnd.resolve_without_data(config_of(documents, vae, "model.llama.vocab_size=64"), rows=8))
    assert planned.flops()["unet"] == task.flops()["unet"] and planned.rows == 8
    assert task.flops()["unet"] == pytest.approx(1.5 * frozen.flops()["unet"])
