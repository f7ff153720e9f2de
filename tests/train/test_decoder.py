"""The decoder's training: what is precomputed, what is learnt, resuming, and parts that do not fit."""

import json
import shutil

import jax
import numpy as np
import pytest

from emu_jax import Emu
from emu_jax.checkpoints.load import LoadedUNet, load_part
from emu_jax.checkpoints.store import open_checkpoint
from emu_jax.data.latents import Latents
from emu_jax.errors import UserError
from emu_jax.generate.precompute import PrecomputeConfig, precompute
from emu_jax.train.loop import train
from tests.train import tiny


def test_examples_are_what_the_model_generates(drawing, documents):
    latents, emu = Latents(drawing / "latents"), Emu.load(drawing)
    pairs = [json.loads(line) for line in tiny.pairs(documents).read_text().splitlines()]
    assert len(latents) == len(pairs) == 12
    np.testing.assert_allclose(latents.unconditional, emu.unconditional[0], atol=1e-5)
    expected = emu.generate_embeddings([[pairs[3]["text"]]])[0]
    np.testing.assert_allclose(latents.read([3])[0].condition, expected, atol=1e-5)
    image = emu.generate_images  # drawing works from the folder that training wrote
    assert image([["a red bar"]], steps=2)[0].image.size == (16, 16)
    first, second = (latents.examples([(3, np.random.default_rng(seed))])[0]["latents"] for seed in (0, 1))
    assert not np.allclose(first, second), "latents are drawn from their Gaussian"


@pytest.mark.long
def test_a_resumed_decoder_is_the_uninterrupted_one(drawing, tmp_path):
    config = tiny.decoder_config(drawing / "latents")
    config.train.steps = 4
    train(config, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "4")
    train(config, tmp_path / "cut")
    whole, cut = (jax.tree.leaves(load_part(tmp_path / name, LoadedUNet).params) for name in ("whole", "cut"))
    for a, b in zip(whole, cut, strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_average_is_what_draws(drawing):
    checkpoint, raw = open_checkpoint(drawing / "unet"), open_checkpoint(drawing / "unet", "raw")
    assert checkpoint.config.optimizer.ema_decay > 0 and checkpoint.ema and not raw.ema
    unet = load_part(drawing / "unet", LoadedUNet)
    assert unet.queries == 4 and unet.config.condition_dim == 16, "sizes filled in from the examples"


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("condition_dim", 32, "config.unet.condition_dim=32, but the examples in .* have 16"),
        ("latent_channels", 4, "config.unet.latent_channels=4, but the examples in .* have 2"),
        ("block_channels", (8, 8, 8, 8, 8), "unet.block_channels has 5 blocks, unet.attention_blocks 2"),
        ("heads", 3, "does not divide by unet.groups=4 and unet.heads=3"),
    ],
)
def test_sizes_that_do_not_fit(drawing, tmp_path, field, value, message):
    config = tiny.decoder_config(drawing / "latents")
    with config.unlocked(), config.ignore_type():
        config.unet[field] = value
    with pytest.raises(UserError, match=message):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_decoder_of_another_model(drawing, golden):
    folder = golden / "mini-a" / "pretrain"
    with pytest.raises(UserError, match="the decoder's condition is 32 wide, the model's embeddings are 16"):
        Emu.load(drawing, decoder=folder)


def test_parts_that_are_not_there(drawing, trained, tmp_path):
    with pytest.raises(UserError, match="no visual decoder; expected the folders unet and vae in it"):
        Emu.load(trained, decoder=tmp_path)
    with pytest.raises(UserError, match="holds vae; expected emu"):
        Emu.load(drawing / "vae")
    with pytest.raises(UserError, match=r"no index\.json in it; expected a folder of `emu-jax precompute`"):
        Latents(tmp_path)
    with pytest.raises(UserError, match="the folder holds examples of other settings: records is "):
        precompute(drawing, drawing / "vae", drawing / "latents", PrecomputeConfig(split="train"))
    with pytest.raises(UserError, match="this model has no visual decoder"):
        Emu.load(trained).generate_image(["a red bar"])
