"""Runs of the objective instruct: beside integer kernels, loaded again, merged."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emu_jax import Emu
from emu_jax.checkpoints.load import load_emu
from emu_jax.checkpoints.store import newest_folder, read_meta
from emu_jax.cli import main
from emu_jax.errors import UserError
from emu_jax.models import lora
from emu_jax.models.paths import flatten
from emu_jax.models.quantise import KINDS
from emu_jax.train.loop import train
from emu_jax.train.tasks.task import make_task
from tests.train import tiny
from tests.train.test_step import DOCUMENTS, batch_of

# ---------------------------------------------------------------- integer kernels


@pytest.fixture(scope="module", params=["int8"])
def integers(request, trained, tmp_path_factory):
    """A pretraining run, exported and converted to integers."""
    pytest.importorskip("torch", reason="install .[convert]")
    folder = tmp_path_factory.mktemp(request.param)
    heads = ["--vision-head-dim", "8", "--llama-head-dim", "8"]
    assert main(["export", "--from", str(trained), "--to", str(folder / "emu"), "--format", "emu"]) == 0
    kind = ["--quantise", request.param]
    assert main(["convert", "--from", str(folder / "emu"), "--to", str(folder / "run"), *kind, *heads]) == 0
    return folder / "run"


@pytest.mark.slow
def test_adapters_train_beside_integer_kernels(integers, documents, tmp_path, capsys):
    kind = load_emu(integers).config.llama.quantised
    config = tiny.instruct_config(documents, integers)
    config.model.llama.quantised = kind
    config.model.standardise = False  # published files hold no statistics
    config.train.steps = 6
    train(config, tmp_path / "run")
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0], f"expected the loss to fall: {losses}"
    before, after = load_emu(integers), load_emu(tmp_path / "run")
    assert after.config.llama.quantised == kind and after.config.llama.lora_rank == 2
    old, new = flatten(before.params), flatten(after.params)
    kinds = {path: leaf.dtype for path, leaf in new.items() if leaf.dtype == KINDS[kind]}
    names = [f"attn/{name}" for name in "qkvo"] + [f"mlp/{name}" for name in ("gate", "up", "down")]
    assert set(kinds) == {f"llama/blocks/{name}/kernel" for name in names}
    grown = ("llama/embed/embedding", "llama/lm_head/kernel")  # two tokens more: [USER], [ASSISTANT]
    for path in old.keys() - set(grown):
        np.testing.assert_array_equal(old[path], new[path], err_msg=path)
    added = {
        f"llama/blocks/{name}/{side}" for name in ("attn/q", "attn/v", "mlp/down") for side in ("lora_a", "lora_b")
    }
    assert new.keys() - old.keys() == added
    assert all(float(jnp.abs(new[path]).max()) > 0 for path in added), "b started as 0"
    leaves = read_meta(newest_folder(tmp_path / "run"))["leaves"]
    moments = {name.partition("/mu/")[2] for name in leaves if name.startswith("optimizer/") and "/mu/" in name}
    assert moments == added

    restored = flatten(train(config, tmp_path / "run").params)  # a finished run is restored and left as it is
    assert restored.keys() == new.keys()
    for path, leaf in restored.items():
        np.testing.assert_array_equal(leaf, new[path], err_msg=path)

    emu_i = Emu.load(tmp_path / "run")
    single = emu_i.merged()
    assert single.params["llama"]["blocks"]["mlp"]["up"]["kernel"].dtype == jnp.float32
    scores = [one.score_candidates(["a red"], ["bar", "square"]) for one in (single, emu_i)]
    np.testing.assert_allclose(*scores, rtol=1e-5)

    export = ["export", "--from", str(tmp_path / "run"), "--to"]
    assert main([*export, str(tmp_path / "peft"), "--format", "peft"]) == 0
    capsys.readouterr()
    assert main([*export, str(tmp_path / "llama"), "--format", "llama", "--merge-lora"]) == 2
    error = capsys.readouterr().err
    assert "export the checkpoint they were made from, and the LoRA of this one in the format peft" in error, error


def test_integer_weights_must_come_from_somewhere(documents):
    config = tiny.instruct_config(documents, "")
    config.model.llama.quantised = "int4"
    with pytest.raises(UserError, match=r"quantised=int4: adapters are trained over int8"):
        make_task(config)
    config.model.llama.quantised = "int8"
    with pytest.raises(UserError, match=r"adapters on integers need weights to begin with; name a checkpoint of"):
        make_task(config)
    config.objective = "pretrain"
    with pytest.raises(UserError, match=r"integers are not trained; .* or train adapters beside them with"):
        make_task(config)


# ---------------------------------------------------------------- a run's checkpoint


@pytest.mark.long
def test_a_run_is_loaded_with_its_adapters_beside_the_weights(instructed):
    beside = Emu.load(instructed)
    assert beside.config.llama.lora_targets == ("q", "v", "down") and beside.tokenizer.instruct
    single = beside.merged()
    assert not [path for path in flatten(single.params) if lora.is_adapter(path)]
    found = [emu_i.generate_embeddings([["a red", "bar"]]) for emu_i in (beside, single)]
    assert 0 < np.abs(found[0] - found[1]).max() < 1e-5 * np.abs(found[1]).max()
    assert beside.generate_text([["a"]])[0].token_ids == single.generate_text([["a"]])[0].token_ids


def test_dropout_follows_the_step_s_key(documents, instructed):
    config = tiny.instruct_config(documents, instructed)
    task, _ = make_task(config)
    loaded = load_emu(instructed)
    rows = [batch_of(DOCUMENTS["text only"], rows=1)] * 2
    batch = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *rows)
    loss = jax.jit(lambda key: task.loss(loaded.params, loaded.statistics, batch, key, task.normalisers(batch))[0])
    first, again, other = (float(loss(jax.random.key(seed))) for seed in (0, 0, 1))
    assert first == again != other
