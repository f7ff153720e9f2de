"""Packed checkpoints: one file a part, which loads like the work directory it was made from."""

import json
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors

from emu_jax.checkpoints import packed
from emu_jax.checkpoints.convert.export import export
from emu_jax.checkpoints.load import load_emu
from emu_jax.checkpoints.shipped import MODELS, is_shipped, model_path
from emu_jax.checkpoints.store import open_checkpoint
from emu_jax.cli import main
from emu_jax.errors import UserError
from emu_jax.generate.model import Emu
from emu_jax.models.paths import flatten
from tests.train import tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory, drawing, instructed):
    """A work directory with a decoder and a tuned model, and the same packed, in float32 and in bfloat16."""
    folder = tmp_path_factory.mktemp("packed")
    shutil.copytree(drawing, folder / "run")
    shutil.copytree(instructed, folder / "run" / "chat")
    export(folder / "run", folder / "exact", "packed")
    export(folder / "run", folder / "small", "packed", dtype="bfloat16")
    return folder


def same(left, right):
    return all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True))


def test_loads_as_the_work_directory(model):
    run, packed_one = Emu.load(model / "run"), Emu.load(model / "exact")
    assert run.config == packed_one.config and run.tokenizer.fingerprint == packed_one.tokenizer.fingerprint
    assert same(run.params, packed_one.params) and same(run.statistics, packed_one.statistics)
    ours, theirs = run.decoder, packed_one.decoder
    assert (ours.unet_config, ours.vae_config, ours.schedule) == (
        theirs.unet_config,
        theirs.vae_config,
        theirs.schedule,
    )
    assert same(ours.unet_params, theirs.unet_params) and same(ours.vae_params, theirs.vae_params)


def test_matrices_are_rounded_and_vectors_are_not(model):
    run, small = load_emu(model / "run"), load_emu(model / "small")
    for (name, exact), (_, rounded) in zip(flatten(run.params).items(), flatten(small.params).items(), strict=True):
        expected = exact.astype(ml_dtypes.bfloat16) if exact.ndim > 1 else exact
        assert rounded.dtype == exact.dtype and np.array_equal(rounded, expected), name


def test_a_tuned_model_shares_what_it_has_in_common(model):
    run, small = Emu.load(model / "run", tuned=True), Emu.load(model / "exact", tuned=True)
    assert small.decoder is not None and "[USER]" in small.tokenizer.added
    assert same(run.params, small.params)
    own = packed.PackedArrays(model / "exact" / "chat")._leaves
    adapters = {name for name in own if "lora_" in name}
    assert adapters and not any("vision" in name for name in own), sorted(own)


def test_is_a_safetensors_file(model):
    with safetensors.safe_open(model / "small" / packed.FILE, framework="flax") as file:
        names = set(file.keys())
        value = file.get_tensor("params/llama/embed/embedding")
    assert names == {name for name in open_checkpoint(model / "run").leaves if not name.startswith("optimizer/")}
    assert value.dtype == "bfloat16"


@pytest.mark.long
def test_can_be_exported_and_continued(model, documents, tmp_path):
    from emu_jax.config import load_config
    from emu_jax.train.loop import train

    export(model / "exact", tmp_path / "again", "emu")
    export(model / "run", tmp_path / "first", "emu")
    name = "multimodal_encoder/pytorch_model.bin"
    assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "first" / name).read_bytes()
    words = [f"--config.data.source={documents}", "--config.train.steps=1", f"--config.init.emu={model / 'exact'}"]
    train(load_config(tiny.__file__, words), tmp_path / "run")
    assert open_checkpoint(tmp_path / "run").holds == "emu"


@pytest.mark.parametrize("where", ["header", "metadata", "data", "cut", "empty", "base"])
def test_damage_is_named(model, tmp_path, where):
    folder = tmp_path / "copy"
    shutil.copytree(model / "small", folder)
    file = folder / packed.FILE
    content = bytearray(file.read_bytes())
    if where == "header":
        content[8:12] = b"!!!!"
    elif where == "metadata":
        at = content.index(b"fingerprint")
        content[at : at + 5] = b"Finge"
    elif where == "data":
        content[-100] ^= 16
    elif where == "cut":
        content = content[:-64]
    elif where == "empty":
        content = bytearray()
    file.write_bytes(content)
    if where == "base":
        file.unlink()
    with pytest.raises(UserError) as error:
        load_emu(folder / "chat" if where == "base" else folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value), str(error.value)


def test_names_of_shipped_models(monkeypatch, tmp_path):
    monkeypatch.setitem(MODELS, "emu-mini", tmp_path / "emu-mini")
    with pytest.raises(UserError, match="carries no such model"):
        model_path("emu-mini")
    folder = tmp_path / "emu-mini"
    folder.mkdir()
    assert model_path("emu-mini") == folder and model_path("emu-mini/chat") == folder / "chat"
    assert str(model_path("./emu-mini")) == "emu-mini" and str(model_path("runs/emu-mini")) == "runs/emu-mini"
    assert is_shipped(folder / "benchmarks") and not is_shipped(model_path("runs/emu-mini"))


def test_int4_is_refused(model, tmp_path, capsys):
    heads = ["--vision-head-dim", "8", "--llama-head-dim", "8"]
    export(model / "run", tmp_path / "emu", "emu")
    words = ["--from", str(tmp_path / "emu"), "--to", str(tmp_path / "int4"), "--quantise", "int4", *heads]
    assert main(["convert", *words]) == 0
    for dtype in (None, "bfloat16"):
        with pytest.raises(UserError, match="kernel is int4, which the format packed does not hold; use int8"):
            export(tmp_path / "int4", tmp_path / "packed", "packed", dtype=dtype)
    assert not (tmp_path / "packed").exists()


def test_merging_is_refused(model, tmp_path):
    with pytest.raises(UserError, match="keeps LoRA beside its weights"):
        export(model / "run", tmp_path / "out", "packed", merge_lora=True)
    assert json.dumps(sorted(p.name for p in tmp_path.iterdir())) == "[]"
