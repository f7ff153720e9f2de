"""Emu2's shape as configs: its sizes, and its objective's parts."""

import math

import jax
import pytest

from emu_jax.config import load_config
from emu_jax.models import emu
from emu_jax.train.tasks.decoder import DecoderLossConfig
from tests.pages import ROOT


def model_of(variant: str) -> emu.EmuConfig:
    config = load_config(f"{ROOT}/configs/emu2.py:{variant}")
    config.model.llama.vocab_size = config.model.llama.vocab_size or 2_004
    return emu.EmuConfig.from_dict(config.model)


def test_the_published_sizes_have_37_billion_parameters():
    sizes = {
        part: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
        for part, tree in emu.abstract(model_of("37b")).items()
    }
    print(sizes)
    assert sizes["vision"] == pytest.approx(4.4e9, rel=0.03)  # EVA-02-CLIP-E's visual tower
    assert sizes["llama"] == pytest.approx(32.5e9, rel=0.01)  # LLaMA-33B, with a visual head
    assert sum(sizes.values()) == pytest.approx(37e9, rel=0.01)


def test_an_image_is_its_pooled_patches():
    model = model_of("mini")
    assert model.causal.kind == "pooled" and model.vision.patches == 4 * model.causal.queries
    assert set(emu.abstract(model)["causal"]) == {"projection"}
    config = load_config(f"{ROOT}/configs/emu2.py:mini")
    name = 14  # tokens of a name, at most
    assert config.data.row_tokens // (name + 16 + 2) == 96 // (
        name + 8 + 2
    )  # as many pairs as in the quick start's row


def test_the_decoder_is_an_autoencoder():
    config = load_config(f"{ROOT}/configs/emu2.py:decoder")
    assert DecoderLossConfig(**config.loss).encoded_share == 1.0 and config.online.model == "runs/emu2"
