"""Training that begins with converted parts: taken over exactly, new tokens as means, what does not fit is named."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import models, pretrain
from emu_jax.checkpoints.load import LoadedUNet, load_emu, load_leaves, load_part
from emu_jax.checkpoints.store import open_checkpoint
from emu_jax.cli import main
from emu_jax.config import load_config
from emu_jax.errors import UserError
from emu_jax.models import unet
from emu_jax.models.paths import flatten
from emu_jax.sharding import make_mesh
from emu_jax.storage import copy_folder
from emu_jax.train.init_from import _check_sizes, init_from_checkpoints
from emu_jax.train.loop import train
from emu_jax.train.optimizer import OptimizerConfig
from emu_jax.train.state import TrainState, create_state
from emu_jax.train.tasks.decoder import TrainDecoder
from emu_jax.train.tasks.task import make_task
from tests.train import tiny


@pytest.fixture(scope="module")
def parts(hugging_llama, eva_clip, tmp_path_factory):
    """LLaMA (97 tokens) and EVA-CLIP's tower, converted."""
    folder = tmp_path_factory.mktemp("parts")
    llama, clip = hugging_llama[0], eva_clip[0]
    assert main(["convert", "--from", str(llama), "--to", str(folder / "llama")]) == 0
    assert main(["convert", "--from", str(clip), "--to", str(folder / "vision"), "--vision-head-dim", "12"]) == 0
    return folder


def make_config(parts, documents) -> ConfigDict:
    """The debug experiment with the sizes of the parts."""
    config = load_config(tiny.__file__, [f"--config.data.source={documents}", "--config.train.steps=2"])
    config.init = ConfigDict({"emu": "", "llama": str(parts / "llama"), "vision": str(parts / "vision")})
    for part in ("llama", "vision"):
        config.model[part].update(open_checkpoint(parts / part).config.model[part])
    config.model.llama.update({"vocab_size": 0, "context": 128})
    return config


def begun(config: ConfigDict, mesh_sizes: dict | None = None):
    task, inputs = make_task(config)
    mesh = make_mesh(mesh_sizes or {"fsdp": -1})
    optimizer = OptimizerConfig.from_dict(config.optimizer)
    with jax.set_mesh(mesh):
        fresh = create_state(task, optimizer, 0, mesh)
        kept = jax.tree.map(np.asarray, fresh.params)
        return kept, init_from_checkpoints(fresh, inputs.config, task.init_parts, inputs.tokenizer.role_words)


@pytest.mark.long
def test_parts_are_taken_over_and_the_rest_stays_fresh(parts, documents, hugging_llama):
    config = make_config(parts, documents)
    fresh, state = begun(config)
    fresh, found = flatten(fresh), {name: np.asarray(value) for name, value in flatten(state.params).items()}
    network = {name: value.detach().numpy() for name, value in hugging_llama[1].state_dict().items()}
    down = np.stack([network[f"model.layers.{i}.mlp.down_proj.weight"].T for i in range(3)])
    np.testing.assert_array_equal(found["llama/blocks/mlp/down/kernel"], down)
    old = network["model.embed_tokens.weight"]
    new = found["llama/embed/embedding"]
    assert len(new) > len(old) == 97
    np.testing.assert_array_equal(new[:97], old)
    np.testing.assert_allclose(new[97:], np.broadcast_to(old.mean(0), new[97:].shape), rtol=1e-5, atol=1e-6)
    head = network["lm_head.weight"].T
    np.testing.assert_array_equal(found["llama/lm_head/kernel"][:, :97], head)
    np.testing.assert_allclose(found["llama/lm_head/kernel"][:, 97], head.mean(1), rtol=1e-5, atol=1e-6)
    vision = open_checkpoint(parts / "vision")
    for name, value in load_leaves(vision, wanted(vision.leaves)).items():
        np.testing.assert_array_equal(found[name.removeprefix("params/")], value)
    for name in ("causal/queries", "ln_visual/scale", "llama/visual_head/kernel"):
        np.testing.assert_array_equal(found[name], fresh[name])


def test_parts_in_a_bucket_are_the_same(parts, documents, bucket):
    copy_folder(parts, bucket)
    config = make_config(parts, documents)
    _, local = begun(config)
    config.init = ConfigDict({"emu": "", "llama": f"{bucket}/llama", "vision": f"{bucket}/vision"})
    _, state = begun(config)
    jax.tree.map(np.testing.assert_array_equal, state.params, local.params)


def wanted(leaves) -> dict:
    return {name: jax.ShapeDtypeStruct(tuple(shape), jnp.dtype(kind)) for name, (shape, kind) in leaves.items()}


@pytest.mark.slow
def test_a_run_begins_there_and_resumes(parts, documents, tmp_path):
    config = make_config(parts, documents)
    config.optimizer.learning_rate.update({"vision": 0.0, "llama": 0.0})
    train(config, tmp_path / "run")
    params = load_emu(tmp_path / "run").params
    _, state = begun(config)
    for part in ("vision", "llama"):  # learning rate 0: as they began
        for name, value in flatten(state.params[part]).items():
            np.testing.assert_array_equal(flatten(params[part])[name], value)


def test_a_whole_model_is_taken_over(trained, documents):
    config = load_config(tiny.__file__, [f"--config.data.source={documents}", "--config.train.steps=2"])
    config.init = ConfigDict({"emu": str(trained), "llama": "", "vision": ""})
    _, state = begun(config)
    loaded = load_emu(trained)
    jax.tree.map(np.testing.assert_array_equal, state.params, loaded.params)
    jax.tree.map(np.testing.assert_array_equal, state.statistics, loaded.statistics)
    assert float(loaded.statistics["count"]) > 0


def test_the_encoder_of_an_emu_alone(trained, documents):
    """`init.vision` of a run: its vision encoder and ln_visual; all else, and the statistics, begin afresh."""
    config = load_config(tiny.__file__, [f"--config.data.source={documents}", "--config.train.steps=2"])
    config.init = ConfigDict({"emu": "", "llama": "", "vision": str(trained)})
    config.model.causal.update({"kind": "pooled", "queries": 2})  # it need not be like that of the run
    fresh, state = begun(config)
    fresh, found, theirs = flatten(fresh), flatten(state.params), flatten(load_emu(trained).params)
    for name, value in found.items():
        taken = name.startswith(("vision/", "ln_visual/"))
        np.testing.assert_array_equal(value, theirs[name] if taken else fresh[name], err_msg=name)
    assert any((theirs[name] != fresh[name]).any() for name in found if name.startswith("vision/"))
    assert float(state.statistics["count"]) == 0


def test_another_kind_of_causal_transformer_is_refused(trained, documents, tmp_path):
    config = load_config(tiny.__file__, [f"--config.data.source={documents}"])
    config.init = ConfigDict({"emu": str(trained), "llama": "", "vision": ""})
    config.model.causal.kind = "bidirectional"
    with pytest.raises(UserError, match=r"made with model\.causal\.kind=causal, this config has bidirectional; set it"):
        train(config, tmp_path / "run")


def test_adapters_are_not_lost_without_a_word(instructed, documents, tmp_path):
    with pytest.raises(UserError, match=r"config\.init\.emu=.*: holds LoRA beside its weights; convert it with merge"):
        train(tiny.instruct_config(documents, instructed), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_part_is_not_a_model(parts):
    with pytest.raises(UserError, match=r"holds llama; expected emu; training can begin from it, by config.init"):
        load_emu(parts / "llama")


def test_chat_s_tokens_begin_as_the_words_they_stand_for(trained, documents):
    config = load_config(tiny.__file__, [f"--config.data.source={documents}", "--config.train.steps=2"])
    config.init = ConfigDict({"emu": str(trained), "llama": "", "vision": ""})
    config.objective = "instruct"
    config.model.llama.update({"lora_rank": 2, "lora_alpha": 2.0})
    config.optimizer.learning_rate = ConfigDict({"llama": 1e-3})
    _, state = begun(config)
    tokenizer = make_task(config)[1].tokenizer
    params = load_emu(trained).params
    old, new = (np.asarray(flatten(tree)["llama/embed/embedding"]) for tree in (params, state.params))
    assert len(new) == len(old) + 2
    for token, word in zip((len(old), len(old) + 1), ("user", "assistant"), strict=True):
        spelt = tokenizer.encode_plain(word)
        np.testing.assert_allclose(new[token], old[spelt].mean(0), rtol=1e-5, err_msg=f"{word}: {spelt}")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("llama.width", 96, r"made with model\.llama\.width=48, this config has 96; set it to that"),
        ("llama.norm_eps", 1e-6, r"made with model\.llama\.norm_eps=3e-06, this config has 1e-06"),
        ("vision.layers", 9, r"made with model\.vision\.layers=\d, this config has 9"),
    ],
)
def test_other_sizes_are_refused_before_anything_is_written(parts, documents, tmp_path, field, value, message):
    config = make_config(parts, documents)
    part, name = field.split(".")
    config.model[part][name] = value
    with pytest.raises(UserError, match=message):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_no_number_of_kv_heads_means_as_many_as_heads():
    _check_sizes("weights", "model.llama", {"heads": 4, "kv_heads": 4}, {"heads": 4, "kv_heads": 0})
    with pytest.raises(UserError, match=r"weights: made with model\.llama\.kv_heads=2, this config has 4"):
        _check_sizes("weights", "model.llama", {"heads": 4, "kv_heads": 2}, {"heads": 4, "kv_heads": 0})


@pytest.mark.parametrize(
    ("init", "message"),
    [
        ({"lama": "x"}, r"config\.init\.lama is no part of this model; choose among emu, llama, vision"),
        (
            {"llama": "absent"},
            r"config\.init\.llama=absent: no such folder; expected one that `emu-jax convert` or",
        ),
        ({"llama": "vision"}, r"holds vision; expected llama"),
    ],
)
def test_what_cannot_be_begun_with(parts, documents, tmp_path, monkeypatch, init, message):
    monkeypatch.chdir(parts)
    config = make_config(parts, documents)
    config.init = ConfigDict(init)
    with pytest.raises(UserError, match=message):
        train(config, tmp_path / "run")


@pytest.mark.slow
def test_a_decoder_begins_with_stable_diffusions_unet(golden, tmp_path):
    """All but the keys and values of the condition, whose width differs."""
    source = golden / "mini-a" / "pretrain"
    (tmp_path / "sd").mkdir()
    for name in ("unet", "vae", "scheduler"):
        (tmp_path / "sd" / name).symlink_to(source / name)
    assert main(["convert", "--from", str(tmp_path / "sd"), "--to", str(tmp_path / "c")]) == 0
    theirs = load_part(tmp_path / "c" / "unet", LoadedUNet)
    config = ConfigDict(
        {"objective": "decoder", "unet": dataclasses.asdict(theirs.config) | {"condition_dim": 16, "remat": "full"}}
    )
    config.init = ConfigDict({"unet": str(tmp_path / "c" / "unet")})
    fresh = {"unet": unet.init(unet.UNetConfig.from_dict(config.unet), jax.random.key(0))}
    state = init_from_checkpoints(TrainState(0, 0, fresh, None, {"ema": fresh}, {}), config, TrainDecoder.init_parts)
    found, before, expected = flatten(state.params), flatten(fresh), flatten({"unet": theirs.params})
    for name, value in expected.items():
        wide = "attn2/to_k/" in name or "attn2/to_v/" in name
        np.testing.assert_array_equal(found[name], before[name] if wide else value, err_msg=name)
        np.testing.assert_array_equal(flatten(state.statistics["ema"])[name], found[name])
    config.unet.layers_per_block = 3
    with pytest.raises(UserError, match=r"made with unet\.layers_per_block=2, this config has 3"):
        init_from_checkpoints(state, config, TrainDecoder.init_parts)


@pytest.mark.slow
def test_no_device_holds_more_than_its_shard(tmp_path):
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    command = [sys.executable, "-m", "tests.train.initialise", str(tmp_path)]
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_published_configs_name_their_parts():
    for variant, width in (("14b", 5120), ("7b", 4096)):
        config = pretrain.get_config(variant)
        assert config.init.llama and config.init.vision and config.model.llama.width == width
    assert pretrain.get_config().model.vision.to_dict() == models.emu_14b().vision.to_dict()
