"""Diffusers folders: the published size maps onto the library's own key list; what does not fit is named."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from emu_jax.checkpoints.convert import diffusers
from emu_jax.checkpoints.load import LoadedUNet, LoadedVAE, load_part
from emu_jax.cli import main
from emu_jax.errors import UserError
from emu_jax.generate.decoder import Decoder
from emu_jax.models import unet, vae

UNET_SIZES = {"cross_attention_dim": 5120, "sample_size": 64}


@pytest.fixture
def folder(golden, tmp_path):
    """A copy of the golden decoder."""
    for name in ("unet", "vae", "scheduler"):
        shutil.copytree(golden / "mini-a" / "pretrain" / name, tmp_path / name)
    return tmp_path


@pytest.mark.long
def test_stable_diffusion_with_emus_condition_maps_with_nothing_left_over():
    torch = pytest.importorskip("torch")
    library = pytest.importorskip("diffusers")
    with torch.device("meta"):
        theirs = library.UNet2DConditionModel(
            **UNET_SIZES,
            block_out_channels=(320, 640, 1280, 1280),
            down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
            attention_head_dim=8,
        )
        autoencoder = library.AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            latent_channels=4,
        )
    for module, target in ((theirs, unet.abstract(unet.UNetConfig())), (autoencoder, vae.abstract(vae.VAEConfig()))):
        shapes = {key: tuple(value.shape) for key, value in module.state_dict().items()}
        matched = diffusers.match(shapes, target, "meta")
        assert sorted(matched.values()) == sorted(shapes), "every key once"


@pytest.mark.long
def test_odd_latents_as_the_library_does(folder):
    """Sizes that halve to odd ones: 5 x 7 latents through three resolutions."""
    torch = pytest.importorskip("torch")
    library = pytest.importorskip("diffusers")
    theirs = library.UNet2DConditionModel.from_pretrained(folder / "unet")
    loaded = load_part(folder / "unet", LoadedUNet)
    config, params = loaded.config, loaded.params
    random = np.random.default_rng(0)
    latents = random.standard_normal((2, 5, 7, config.latent_channels), np.float32)
    condition = random.standard_normal((2, 6, config.condition_dim), np.float32)
    steps = np.array([3, 700])
    with torch.no_grad():
        arrays = (torch.from_numpy(a) for a in (latents.transpose(0, 3, 1, 2), steps, condition))
        expected = theirs(*arrays).sample.numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(unet.apply(params, latents, steps, condition, config=config), expected, atol=2e-5)


@pytest.mark.long
def test_exported_parts_load_in_diffusers(drawing, tmp_path):
    """Averaged U-Net, and a VAE with the scale that training measured: what the library computes."""
    torch = pytest.importorskip("torch")
    library = pytest.importorskip("diffusers")
    assert main(["export", "--from", str(drawing), "--to", str(tmp_path / "out"), "--format", "diffusers"]) == 0
    ours = Decoder.load(drawing)
    random = np.random.default_rng(0)
    latents = random.standard_normal((2, 8, 8, 2), np.float32)
    condition, steps = random.standard_normal((2, 4, 16), np.float32), np.array([3, 700])
    images = random.uniform(-1, 1, (2, 16, 16, 3)).astype(np.float32)
    theirs = library.UNet2DConditionModel.from_pretrained(tmp_path / "out" / "unet")
    network = library.AutoencoderKL.from_pretrained(tmp_path / "out" / "vae")
    assert abs(network.config.scaling_factor / ours.vae_config.scale - 1) < 1e-6
    with torch.no_grad():
        first = (torch.from_numpy(a) for a in (latents.transpose(0, 3, 1, 2), steps, condition))
        noise = theirs(*first).sample.numpy().transpose(0, 2, 3, 1)
        mean = network.encode(torch.from_numpy(images.transpose(0, 3, 1, 2))).latent_dist.mean.numpy()
        decoded = network.decode(torch.from_numpy(latents.transpose(0, 3, 1, 2)) / ours.vae_config.scale).sample.numpy()
    found = unet.apply(ours.unet_params, latents, steps, condition, config=ours.unet_config)
    assert_close(found, noise)
    assert_close(vae.encode(ours.vae_params, images, config=ours.vae_config)[0], mean.transpose(0, 2, 3, 1))
    assert_close(vae.decode(ours.vae_params, latents, config=ours.vae_config), decoded.transpose(0, 2, 3, 1))


def assert_close(found, expected) -> None:
    worst = np.abs(np.asarray(found) - expected).max() / np.abs(expected).max()
    assert worst < 1e-4, f"off by {worst:.1e} of the largest magnitude, expected below 1e-4"


def test_every_name_comes_back(folder):
    """Our paths give the names of the files they were read from, in diffusers' names of today."""
    for conversion in (diffusers.unet_conversion(folder / "unet"), diffusers.vae_conversion(folder / "vae")):
        for path, key in conversion.about["keys"].items():
            assert diffusers.their_key(path) == key, f"{conversion.holds}: {path}"
            ours = conversion.shapes[f"params/{conversion.holds}/{path}"]
            assert list(diffusers.their_shape(path, ours)) == conversion.about["shapes"][key]


def test_old_attention_names_and_bin_files(folder):
    torch = pytest.importorskip("torch")
    expected = load_part(folder / "vae", LoadedVAE).params
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = {}
    for key, value in load_file(file).items():
        for new, name in old.items():
            key = key.replace(f"attentions.0.{new}.", f"attentions.0.{name}.")
        state[key] = torch.from_numpy(value)
    assert any("proj_attn" in key for key in state)
    torch.save(state, file.with_suffix(".bin"))
    file.unlink()
    found = load_part(folder / "vae", LoadedVAE).params
    for path, value in diffusers.flatten(expected).items():
        assert (diffusers.flatten(found)[path] == value).all(), path


def test_everything_that_does_not_fit_is_named(folder):
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    del state["conv_in.bias"]
    state["extra.weight"] = state["conv_out.weight"]
    state["conv_out.weight"] = state["conv_out.weight"][:1]
    save_file({key: value.copy() for key, value in state.items()}, file)
    with pytest.raises(UserError) as error:
        load_part(folder / "unet", LoadedUNet)
    for name in ("missing: conv_in/bias", "unknown: extra.weight", "misshapen: conv_out.weight"):
        assert name in str(error.value), str(error.value)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("unet/config.json", {"act_fn": "gelu"}, "act_fn='gelu' \\(expected 'silu'\\)"),
        ("vae/config.json", {"shift_factor": 0.1}, "shift_factor=0.1"),
        ("scheduler/scheduler_config.json", {"prediction_type": "v_prediction"}, "prediction_type='v_prediction'"),
    ],
)
def test_another_architecture_is_refused(folder, file, change, message):
    config = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(config | change))
    read = {"unet": diffusers.unet_conversion, "vae": diffusers.vae_conversion, "scheduler": diffusers.load_schedule}
    with pytest.raises(UserError, match=message):
        read[file.split("/")[0]](folder / file.split("/")[0])


@pytest.mark.parametrize("part", ["unet", "vae"])
@pytest.mark.parametrize("kind", ["fp16", "shards", "shards of fp16", "both"])
def test_published_layouts_are_the_same_weights(folder, part, kind):
    read = {"unet": LoadedUNet, "vae": LoadedVAE}[part]
    whole = folder / part / "diffusion_pytorch_model.safetensors"
    expected = diffusers.flatten(load_part(folder / part, read).params)
    dtype = np.float16 if "fp16" in kind else np.float32
    state = {key: value.astype(dtype) for key, value in load_file(whole).items()}
    variant = ".fp16" if "fp16" in kind else ""
    if kind == "fp16":
        save_file(state, whole.with_name("diffusion_pytorch_model.fp16.safetensors"))
    else:
        place = {
            key: f"diffusion_pytorch_model{variant}-0000{i % 2 + 1}-of-00002.safetensors" for i, key in enumerate(state)
        }
        for name in set(place.values()):
            save_file({key: state[key] for key in state if place[key] == name}, whole.with_name(name))
        index = whole.with_name(f"diffusion_pytorch_model.safetensors.index{variant}.json")
        index.write_text(json.dumps({"weight_map": place}))
    if kind != "both":
        whole.unlink()
    found = diffusers.flatten(load_part(folder / part, read).params)
    assert set(found) == set(expected)
    for path, value in expected.items():
        np.testing.assert_array_equal(found[path], np.asarray(value).astype(dtype).astype(np.float32))


@pytest.mark.parametrize("value", [None, True, "8", [], [2, "x"], {}, 0, -1, 1.5, float("nan")])
def test_sizes_that_are_none_are_named(folder, value):
    read = {"unet": diffusers.unet_config, "vae": diffusers.vae_config, "scheduler": diffusers.load_schedule}
    needed = {"unet": diffusers.NEEDED_UNET, "vae": diffusers.NEEDED_VAE, "scheduler": diffusers.NEEDED_SCHEDULER}
    for part, function in read.items():
        file = folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
        config = json.loads(file.read_text())
        for key in needed[part]:
            if value == 1.5 and diffusers.SIZES[key] == diffusers.NUMBER:
                continue
            file.write_text(json.dumps(config | {key: value}))
            with pytest.raises(UserError, match=f"{file.name}: {key}"):
                function(folder / part)
        file.write_text(json.dumps(config))


def test_a_list_that_repeats_one_value_is_the_value(folder):
    file = folder / "unet" / "config.json"
    config = json.loads(file.read_text())
    expected = diffusers.unet_config(folder / "unet")
    repeated = {key: [config[key]] * 4 for key in diffusers.ONE_FOR_ALL & config.keys()}
    assert {"attention_head_dim", "layers_per_block"} <= set(repeated)
    file.write_text(json.dumps(config | repeated))
    assert diffusers.unet_config(folder / "unet") == expected
    file.write_text(json.dumps(config | {"attention_head_dim": [1, 2, 4, 4]}))
    with pytest.raises(UserError, match=r"attention_head_dim=\[1, 2, 4, 4\] \(expected a whole number above 0\)"):
        diffusers.unet_config(folder / "unet")


def test_a_missing_file_is_named(folder):
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UserError, match="holds no weights"):
        load_part(folder / "unet", LoadedUNet)
    (folder / "unet" / "config.json").unlink()
    with pytest.raises(UserError, match="no such file"):
        load_part(folder / "unet", LoadedUNet)
