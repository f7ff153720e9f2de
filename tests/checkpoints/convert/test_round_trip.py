"""Published layout -> ours -> published layout, bit for bit; and what a conversion writes down about itself."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile

import jax
import numpy as np
import pytest

from emu_jax import Emu
from emu_jax.checkpoints.load import load_emu
from emu_jax.checkpoints.store import read_meta
from emu_jax.cli import main
from emu_jax.errors import UserError
from emu_jax.models.quantise import KINDS, quantise
from emu_jax.storage import remove

torch = pytest.importorskip("torch", reason="install .[convert]")
safetensors = pytest.importorskip("safetensors.torch", reason="install .[convert]")

ENCODER = "multimodal_encoder/pytorch_model.bin"
UNET, VAE = (f"{part}/diffusion_pytorch_model.safetensors" for part in ("unet", "vae"))


def run(*arguments) -> None:
    assert main([str(word) for word in arguments]) == 0


def refused(capsys, *arguments) -> str:
    capsys.readouterr()
    assert main([str(word) for word in arguments]) == 2
    return capsys.readouterr().err


def read(path) -> dict:
    if path.suffix == ".safetensors":
        return safetensors.load_file(path)
    state = torch.load(path, weights_only=True)
    return state.get("module", state)


def assert_same_bits(found: dict, expected: dict) -> None:
    assert set(found) == set(expected)
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype and found[key].shape == tensor.shape, key
        a, b = (t.contiguous().reshape(-1).view(torch.uint8) for t in (found[key], tensor))
        assert torch.equal(a, b), f"{key}: not the same bits"


@pytest.fixture(scope="module")
def mini(golden):
    return golden / "mini-a"


@pytest.fixture(scope="module")
def converted(mini, golden, tmp_path_factory):
    """The published folder, converted by the command."""
    out = tmp_path_factory.mktemp("converted") / "emu"
    run(
        "convert", "--from", mini, "--to", out, "--vision-head-dim", 12, "--tokenizer", golden / "llama_tokenizer.model"
    )
    return out


@pytest.fixture(scope="module")
def converted_instruct(mini, tmp_path_factory):
    out = tmp_path_factory.mktemp("converted") / "emu-i"
    run("convert", "--from", mini / "instruct" / "Emu-instruct.pt", "--to", out, "--vision-head-dim", 12)
    return out


@pytest.mark.long
def test_every_tensor_of_the_pretrained_model_comes_back(mini, converted, tmp_path):
    run("export", "--from", converted, "--to", tmp_path / "out", "--format", "emu")
    for file in (ENCODER, UNET, VAE):
        assert_same_bits(read(tmp_path / "out" / file), read(mini / "pretrain" / file))
    with (tmp_path / "out/scheduler/scheduler_config.json").open() as ours:
        theirs = json.loads((mini / "pretrain/scheduler/scheduler_config.json").read_text())
        theirs.pop("_diffusers_version")
        assert json.load(ours) == theirs


def test_every_tensor_of_the_instructed_model_comes_back(mini, converted_instruct, tmp_path):
    run("export", "--from", converted_instruct, "--to", tmp_path / "out", "--format", "emu")
    assert_same_bits(read(tmp_path / "out" / "Emu-instruct.pt"), read(mini / "instruct" / "Emu-instruct.pt"))
    times = {member.date_time for member in zipfile.ZipFile(tmp_path / "out" / "Emu-instruct.pt").infolist()}
    assert times == {(1980, 1, 1, 0, 0, 0)}, f"expected no time of day, so that equal weights are equal bytes: {times}"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["pretrain", "instruct"])
def test_bfloat16_sources_come_back_too(mini, tmp_path, kind, dtype):
    """As the published files mix them: everything but the vision encoder and one projection in bfloat16."""
    file = mini / ("instruct/Emu-instruct.pt" if kind == "instruct" else f"pretrain/{ENCODER}")
    state = {key: value.bfloat16() if "visual" not in key else value for key, value in read(file).items()}
    if dtype == "bfloat16":  # float32 would lose bits there, as it must
        state = {key: value.bfloat16() for key, value in state.items()}
    torch.save({"module": state} if kind == "instruct" else state, tmp_path / "mixed.pt")
    run("convert", "--from", tmp_path / "mixed.pt", "--to", tmp_path / "c", "--vision-head-dim", 12, "--dtype", dtype)
    run("export", "--from", tmp_path / "c", "--to", tmp_path / "out", "--format", "emu")
    name = "Emu-instruct.pt" if kind == "instruct" else ENCODER
    assert_same_bits(read(tmp_path / "out" / name), state)


@pytest.mark.long
def test_converted_weights_are_the_published_ones(mini, converted):
    emu = Emu.load(converted)
    direct = load_emu(mini / "pretrain", vision_head_dim=12)
    assert emu.config == direct.config
    jax.tree.map(np.testing.assert_array_equal, emu.params, direct.params)
    assert emu.decoder is not None and emu.tokenizer.vocab_size == direct.config.llama.vocab_size


@pytest.mark.long
def test_lora_apart_and_merged_are_the_same_model(mini, converted_instruct, tmp_path):
    file = mini / "instruct" / "Emu-instruct.pt"
    run("convert", "--from", file, "--to", tmp_path / "m", "--vision-head-dim", 12, "--merge-lora")
    apart, merged = load_emu(converted_instruct).params, load_emu(tmp_path / "m").params
    direct = load_emu(file, vision_head_dim=12).params
    for found in (apart, merged):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), found, direct)


def test_a_conversion_says_what_it_read_and_wrote(mini, converted):
    meta = read_meta(converted)
    file = mini / "pretrain" / ENCODER
    assert meta["source"]["files"] == {
        file.name: {"sha256": hashlib.sha256(file.read_bytes()).hexdigest(), "bytes": file.stat().st_size}
    }
    assert set(meta["digests"]) == set(meta["leaves"])
    assert sorted(p.name for p in converted.iterdir()) == ["meta", "params", "statistics", "unet", "unused", "vae"]


CONVERT = "import sys; from emu_jax.checkpoints import streamed; streamed.RECORD_S = 0; "
CONVERT += "from emu_jax.cli import main; sys.exit(main(['convert', *sys.argv[1:]]))"


def kill_conversion(source, out, slices: int) -> list[str]:
    """Kills a conversion once this many slices are recorded; returns the command."""
    progress = out.with_name(f"{out.name}.partial") / "progress.json"
    command = [sys.executable, "-c", CONVERT, "--from", str(source), "--to", str(out), "--vision-head-dim", "12"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (
        progress.exists() and len(json.loads(progress.read_text())["done"]) >= slices
    ):
        time.sleep(0.001)
    process.kill()
    process.wait()
    assert progress.exists() and not out.exists(), "killed in the middle"
    return command


@pytest.mark.long
def test_a_killed_conversion_is_resumed(mini, tmp_path, converted_instruct):
    out = tmp_path / "c"
    command = kill_conversion(mini / "instruct" / "Emu-instruct.pt", out, 20)
    found = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    assert found.returncode == 0 and "tensors written by an earlier run" in found.stdout, found.stdout + found.stderr
    ours, theirs = (read_meta(path) for path in (out, converted_instruct))
    assert ours == theirs
    assert {path.name for path in out.iterdir()} == {path.name for path in converted_instruct.iterdir()}


@pytest.mark.long
def test_parts_of_another_conversion_are_not_taken(mini, tmp_path):
    """What a killed run left behind serves the same conversion again, and no other."""
    meta, stamps = tmp_path / "c" / "unet" / "meta" / "metadata", []
    kill_conversion(mini, tmp_path / "c", 20)
    left = shutil.copytree(tmp_path / "c.partial", tmp_path / "left")
    for dtype in ("float32", "bfloat16"):
        remove(tmp_path / "c")
        shutil.copytree(left, tmp_path / "c.partial", dirs_exist_ok=True)
        run("convert", "--from", mini, "--to", tmp_path / "c", "--vision-head-dim", 12, "--dtype", dtype)
        assert {kind for _, kind in read_meta(tmp_path / "c" / "unet")["leaves"].values()} == {dtype}
        stamps.append(meta.stat().st_mtime_ns)
    assert (left / "unet" / "meta" / "metadata").stat().st_mtime_ns == stamps[0], "the first run took the U-Net over"
    assert not (tmp_path / "c.partial").exists()


def test_nothing_is_written_over(mini, converted, tmp_path, capsys):
    assert "it exists; name a new folder" in refused(capsys, "convert", "--from", mini, "--to", converted)
    assert "it exists" in refused(capsys, "export", "--from", converted, "--to", tmp_path, "--format", "emu")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--from", "absent"], "absent: no such file or folder; expected the published Emu's folder"),
        (["--from", "."], ".: holds no known weights; expected the published Emu's folder"),
        (["--from", "w.ckpt"], "not a known kind of weights file"),
        (["--from", "w.bin", "--dtype", "float8"], "dtype='float8' for weights; expected one of float32, bfloat16"),
    ],
)
def test_what_cannot_be_converted(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "w.ckpt").write_bytes(b"")
    torch.save({"w": torch.ones(1)}, tmp_path / "w.bin")
    error = refused(capsys, "convert", "--to", "out", *arguments)
    assert message in error and error.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["w.bin", "w.ckpt"]


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ("onnx", "format 'onnx' is unknown; choose one of emu, llama, llama-base, diffusers, peft"),
        ("peft", "holds no LoRA"),
    ],
)
def test_what_cannot_be_exported(converted, tmp_path, capsys, form, message):
    assert message in refused(capsys, "export", "--from", converted, "--to", tmp_path / "o", "--format", form)
    assert list(tmp_path.iterdir()) == []


def test_other_tokenizers_do_not_fit(mini, tmp_path, capsys):
    from emu_jax.data.tokenizer import Tokenizer

    words = Tokenizer.train(["a red bar", "a blue cross"] * 9, vocab_size=300)
    (tmp_path / "t.model").write_bytes(words.proto)
    arguments = ["--from", mini, "--to", tmp_path / "c", "--vision-head-dim", 12, "--tokenizer", tmp_path / "t.model"]
    assert "name the tokenizer that belongs to them" in refused(capsys, "convert", *arguments)
    assert [p.name for p in tmp_path.iterdir()] == ["t.model"]


def test_integers_and_lora_do_not_mix(mini, tmp_path, capsys):
    file = mini / "instruct" / "Emu-instruct.pt"
    error = refused(
        capsys, "convert", "--from", file, "--to", tmp_path / "c", "--vision-head-dim", 12, "--quantise", "int8"
    )
    assert "holds LoRA, which cannot stay apart from integers; set merge_lora too" in error


def test_parts_are_not_stored_in_integers(hugging_llama, eva_clip, tmp_path, capsys):
    for source in (hugging_llama[0], eva_clip[0]):
        error = refused(
            capsys, "convert", "--from", source, "--to", tmp_path / "c", "--vision-head-dim", 12, "--quantise", "int4"
        )
        assert "is a part to initialise training from; only a whole Emu is stored in integers" in error
    assert not list(tmp_path.iterdir())


@pytest.mark.long
def test_checkpoints_of_training_are_exported(drawing, tmp_path, caplog):
    """Orbax's own layout, with averaged parameters of the decoder, in and out again."""
    run("export", "--from", drawing, "--to", tmp_path / "out", "--format", "emu")
    assert "normalises its images' embeddings" in caplog.text, "its statistics are lost"
    loaded = load_emu(drawing)
    vision, llama = loaded.config.vision, loaded.config.llama
    heads = {"vision_head_dim": vision.width // vision.heads, "llama_head_dim": llama.width // llama.heads}
    again = load_emu(tmp_path / "out", **heads).params
    jax.tree.map(np.testing.assert_array_equal, again, loaded.params)
    theirs = Emu.load(drawing).decoder
    from emu_jax.generate.decoder import Decoder

    ours = Decoder.load(tmp_path / "out")
    jax.tree.map(np.testing.assert_array_equal, ours.unet_params, theirs.unet_params)
    jax.tree.map(np.testing.assert_array_equal, ours.vae_params, theirs.vae_params)
    assert ours.size == theirs.size and abs(ours.vae_config.scale / theirs.vae_config.scale - 1) < 1e-6


@pytest.mark.long
def test_bfloat16_weights_draw(mini, golden, tmp_path):
    words = golden / "llama_tokenizer.model"
    small = ["--dtype", "bfloat16", "--tokenizer", words, "--vision-head-dim", 12]
    run("convert", "--from", mini, "--to", tmp_path / "c", *small)
    emu = Emu.load(tmp_path / "c")
    models = (emu.params, emu.decoder.unet_params, emu.decoder.vae_params)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(models)} == {"bfloat16"}
    assert emu.generate_image(["a red bus"], sampler="ddim", steps=1, height=32, width=32).image.size == (32, 32)


@pytest.mark.long
@pytest.mark.parametrize("kind, off", [("int8", 0.1), ("int4", 0.6)])
def test_integer_weights_generate(mini, golden, converted, tmp_path, kind, off):
    arguments = ["--vision-head-dim", 12, "--tokenizer", golden / "llama_tokenizer.model", "--quantise", kind]
    run("convert", "--from", mini, "--to", tmp_path / "q", *arguments)
    exact, small = Emu.load(converted), Emu.load(tmp_path / "q")
    for name in ("up", "down"):
        kernels = small.params["llama"]["blocks"]["mlp"][name]
        integers, scale = quantise(exact.params["llama"]["blocks"]["mlp"][name]["kernel"], kind)
        assert kernels["kernel"].dtype == KINDS[kind]
        np.testing.assert_array_equal(kernels["kernel"].astype(np.int8), integers.astype(np.int8))
        np.testing.assert_array_equal(kernels["scale"], scale)
    near, far = (emu.generate_embeddings([["a red bus"]]) for emu in (small, exact))
    assert 0 < np.abs(near - far).max() < off * np.abs(far).max()


@pytest.mark.long
def test_integer_weights_stay_here(mini, tmp_path, capsys):
    run("convert", "--from", mini, "--to", tmp_path / "q", "--vision-head-dim", 12, "--quantise", "int8")
    error = refused(capsys, "export", "--from", tmp_path / "q", "--to", tmp_path / "o", "--format", "llama")
    assert "holds int8 weights; export the checkpoint they were made from" in error
    with pytest.raises(UserError, match="holds no tokenizer"):
        Emu.load(tmp_path / "q")
    error = refused(capsys, "convert", "--from", mini, "--to", tmp_path / "p", "--quantise", "int2")
    assert "quantise='int2'; expected one of int8, int4" in error
