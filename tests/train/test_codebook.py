"""A codebook's EMA against plain Python; a codebook from training to a model that predicts its codes."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emu_jax import Emu
from emu_jax.checkpoints.load import load_leaves
from emu_jax.checkpoints.store import open_checkpoint
from emu_jax.config import load_config
from emu_jax.errors import UserError
from emu_jax.models import emu
from emu_jax.models.paths import flatten
from emu_jax.train.loop import train
from emu_jax.train.tasks.codebook import CodebookConfig, TrainCodebook, update, usage_metrics
from emu_jax.train.tasks.task import make_task
from tests.train import tiny

SIZES = {"codes": 8, "groups": 2, "width": 4}


def test_each_entry_is_the_decayed_mean_of_what_fell_to_it():
    """One group of three codes, decay 1/2: usage 4, 2, 0; z of 1, 3 fall to code 0, 8 to code 1."""
    config = CodebookConfig(codes=3, groups=1, width=1, decay=0.5, revive=0.0)
    z, codes = jnp.array([[[1.0]], [[3.0]], [[8.0]]]), jnp.array([[0], [0], [1]])
    codebook, usage = jnp.array([[[10.0], [20.0], [30.0]]]), jnp.array([[4.0, 2.0, 0.0]])
    codebook, usage = update(config, codebook, usage, z, codes, jax.random.key(0))
    np.testing.assert_allclose(usage, [[0.5 * 4 + 0.5 * 2, 0.5 * 2 + 0.5 * 1, 0.0]])
    expected = [(2 * 10 + 0.5 * (1 + 3)) / 3, (1 * 20 + 0.5 * 8) / 1.5, 30.0]
    np.testing.assert_allclose(codebook[0, :, 0], expected, rtol=1e-6)


def test_a_code_that_nothing_falls_to_begins_anew():
    config = CodebookConfig(codes=3, groups=1, width=1, decay=0.5, revive=0.1)
    z, codes = jnp.array([[[1.0]], [[3.0]], [[8.0]]]), jnp.array([[0], [0], [1]])
    codebook, usage = jnp.array([[[10.0], [20.0], [30.0]]]), jnp.array([[4.0, 2.0, 0.0]])
    codebook, usage = update(config, codebook, usage, z, codes, jax.random.key(0))
    np.testing.assert_allclose(usage, [[3.0, 1.5, 1.5]])  # an even share of 4.5
    assert float(codebook[0, 2, 0]) in (1.0, 3.0, 8.0)


def test_the_first_batch_fills_the_codebook():
    config = CodebookConfig(codes=16, groups=2, width=4)
    z = jax.random.normal(jax.random.key(0), (5, 8, 2, 2))
    empty, unused = jnp.zeros((2, 16, 2)), jnp.zeros((2, 16))
    codebook, usage = update(config, empty, unused, z, jnp.zeros((5, 8, 2), int), jax.random.key(1))
    there = {tuple(row) for row in np.asarray(z[:, :, 1]).reshape(-1, 2).tolist()}
    assert {tuple(row) for row in np.asarray(codebook[1, 1:]).tolist()} <= there
    assert (np.asarray(usage) > 0).all()


def test_usage():
    found = usage_metrics(jnp.array([[5.0, 5.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]]))
    assert float(found["perplexity"]) == pytest.approx((2 + 4) / 2)
    assert float(found["codes_used"]) == pytest.approx((0.5 + 1.0) / 2)
    nothing = usage_metrics(jnp.zeros((1, 4)))
    assert np.isfinite([float(value) for value in nothing.values()]).all()


# ---- from training to a model that predicts codes ------------------------------------------------------------------


@pytest.fixture(scope="module")
def codebook(trained, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("codebook") / "run"
    train(codebook_config(trained), workdir)
    return workdir


def codebook_config(trained):
    config = load_config("configs/codebook.py", ["--config.data.split=heldout_combinations"])
    config.model = load_config(tiny.__file__, []).model
    config.init.encoder = str(trained)
    config.codebook.update(SIZES)
    config.data.batch = 4
    config.train.update({"steps": 6, "log_every": 1, "checkpoint_every": 3})
    return config


def codes_config(documents, codebook, encoder, *overrides: str):
    sizes = [f"--config.model.visual_head.{name}={size}" for name, size in SIZES.items()]
    settings = [f"--config.data.source={documents}", "--config.model.visual_head.name=codes", *sizes]
    settings += [f"--config.init.codebook={codebook}", f"--config.init.encoder={encoder}", "--config.train.steps=3"]
    settings += [f"--config.optimizer.learning_rate.{part}=0" for part in ("vision", "causal")]
    return load_config(tiny.__file__, [*settings, *overrides])


def test_the_encoder_is_frozen_and_the_metrics_say_how_codes_are_used(codebook, trained):
    rows = [json.loads(line) for line in (codebook / "metrics.jsonl").read_text().splitlines()]
    for row in rows[1:]:
        assert 1 <= row["perplexity"] <= SIZES["codes"] and 0 < row["codes_used"] <= 1, row
    checkpoint = open_checkpoint(codebook)
    assert checkpoint.holds == "codebook"
    theirs = flatten(Emu.load(trained).params)
    wanted = {n: jax.ShapeDtypeStruct(*leaf) for n, leaf in checkpoint.leaves.items() if n.startswith("params/vision/")}
    for name, leaf in load_leaves(checkpoint, wanted).items():
        np.testing.assert_array_equal(leaf, theirs[name.removeprefix("params/")], err_msg=name)


def test_a_model_keeps_the_quantiser_and_the_encoder_as_they_were(codebook, trained, documents, tmp_path):
    train(codes_config(documents, codebook, trained), tmp_path / "run")
    model, source = Emu.load(tmp_path / "run"), Emu.load(trained)
    checkpoint = open_checkpoint(codebook)
    names = {"params/quantiser/down/kernel": "quantiser/down/kernel", "statistics/codebook": "embedding"}
    leaves = load_leaves(checkpoint, {name: jax.ShapeDtypeStruct(*checkpoint.leaves[name]) for name in names})
    head = flatten(model.params["llama"]["visual_head"])
    for name, here in names.items():
        np.testing.assert_array_equal(leaves[name], head[here], err_msg=name)
    for part in emu.ENCODER_PARTS:
        jax.tree.map(np.testing.assert_array_equal, model.params[part], source.params[part])
    jax.tree.map(np.testing.assert_array_equal, model.statistics, source.statistics)
    # every generated embedding is one of the codebook's
    drawn = model.generate_embeddings([["a red bar"], [""]], seeds=[1, 2])  # [2, Q, D]
    module = emu.bind(model.config, model.params).llama.visual_head
    entries = module.embedding[...]  # [2, 8, d/2]
    every = [[entries[0, i], entries[1, j]] for i in range(8) for j in range(8)]
    possible = np.asarray(module.quantiser.restore(jnp.array(every)))  # [64, D]
    distances = np.abs(drawn[:, :, None] - possible).max(-1).min(-1)
    assert distances.max() < 1e-4, distances


def test_what_does_not_fit_is_refused_before_the_first_step(codebook, trained, documents, tmp_path):
    with pytest.raises(UserError, match=r"made with codebook\.codes=8, this config has model\.visual_head\.codes=16"):
        other = "--config.model.visual_head.codes=16"
        train(codes_config(documents, codebook, trained, other), tmp_path / "run")
    with pytest.raises(UserError, match=r"model\.visual_head\.name=l2 has no codebook; set it to codes"):
        config = codes_config(documents, codebook, trained)
        config.model.visual_head = load_config(tiny.__file__, []).model.visual_head
        train(config, tmp_path / "run")
    with pytest.raises(UserError, match=r"config\.init\.encoder is empty: a codebook quantises"):
        empty = codebook_config(trained)
        empty.init.encoder = ""
        train(empty, tmp_path / "run")
    with pytest.raises(UserError, match=r"config\.codebook\.decay=1\.0; expected 0 to below 1"):
        slow = codebook_config(trained)
        slow.codebook.decay = 1.0
        train(slow, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_flops_are_counted(trained):
    task, _ = make_task(codebook_config(trained))
    planned = TrainCodebook(TrainCodebook.resolve_without_data(codebook_config(trained), rows=4))
    assert planned.flops() == task.flops() and planned.batch_shapes() == task.batch_shapes()
    assert all(count > 0 for count in task.flops().values())
