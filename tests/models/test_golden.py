"""Every tensor, loss and gradient of the reference implementation's golden files."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from emu_jax.checkpoints.convert import emu as published
from emu_jax.checkpoints.load import load_emu
from emu_jax.models import emu, lora
from emu_jax.models.paths import flatten
from tests.models.reference_batch import reference_batch

IDS = emu.SpecialIds(pad=32000, img=32001, img_end=32002, image=32003)
FILES = {"pretrain": "mini-a/pretrain", "instruct": "mini-a/instruct/Emu-instruct.pt"}


@pytest.fixture(scope="module", params=FILES)
def case(request, golden):
    """(config, params, batch, reference tensors, file of weights) of one published variant."""
    path = golden / FILES[request.param]
    loaded = load_emu(path, vision_head_dim=12)
    config = dataclasses.replace(loaded.config, loss_chunk=8)
    reference = load_file(golden / "mini-a" / request.param / "reference.safetensors")
    sizes = json.loads((golden / "mini-a" / request.param / "reference.json").read_text())["config"]
    assert config.vision.layers == sizes["vision_cfg"]["layers"]
    assert config.llama.vocab_size == sizes["llama"]["vocab_size"]
    images = reference["images"].transpose(0, 2, 3, 1)  # [3, H, W, 3]
    rows = jnp.stack([images[:2], np.stack([images[2], np.zeros_like(images[2])])])  # row 0 holds two, row 1 one
    tokens, mask = (jnp.asarray(reference[name], jnp.int32) for name in ("input_ids", "attention_mask"))
    batch = reference_batch(rows, tokens, mask, IDS)
    return config, loaded.params, batch, reference, published.find_weights(path)


def assert_close(name: str, got: np.ndarray, expected: np.ndarray, tolerance: float = 2e-4):
    error = np.abs(got - expected).max() / np.abs(expected).max()
    assert error < tolerance, f"{name}: differs by {error:.1e} of the largest magnitude, allowed {tolerance:.0e}"


def test_every_tensor_and_both_losses(case):
    config, params, batch, reference, _ = case
    statistics = emu.initial_statistics(config)
    named = jax.jit(emu.intermediates, static_argnames=("config", "ids"))(
        params, statistics, batch, config=config, ids=IDS
    )
    named = jax.tree.map(np.asarray, named)
    for name in ("vision_features", "ln_visual", "causal_embeds"):
        assert_close(name, named[name][:3], reference[name])
    live = reference["attention_mask"].astype(bool)
    assert_close("hidden_states", named["hidden_states"][live], reference["hidden_states"][live])
    assert_close("logits", named["logits"][..., ::97][live], reference["logits_sample"][live])
    np.testing.assert_array_equal(named["text_mask"], (reference["ce_labels"] != -100)[:, 1:])
    visual = named["visual_mask"]
    assert visual.sum() == 15, "5 pairs for each of 3 images"
    assert_close("regress_pred", named["regress_pred"][visual], reference["regress_pred"])
    assert_close("regress_target", named["regress_target"][visual], reference["regress_target"])
    assert_close("ce_loss", named["text_loss"], reference["ce_loss"])
    assert_close("mse_loss", named["regression_loss"], reference["mse_loss"])


def test_every_gradient(case):
    """Gradients of ce_loss + mse_loss; the reference holds a selection of the parameters' (pretrain only)."""
    config, params, batch, reference, file = case
    expected = {name.removeprefix("grad/"): value for name, value in reference.items() if name.startswith("grad/")}
    if not expected:
        assert "instruct" in str(file), "only the instruct variant comes without gradients"
        return
    gradients = jax.jit(jax.grad(emu.loss, has_aux=True), static_argnames=("config", "ids"))
    grads, _ = gradients(params, emu.initial_statistics(config), batch, config=config, ids=IDS)
    ours = dict(published.to_published(grads, config))
    for name, value in expected.items():
        key, _, rows = name.partition("[[")  # "….weight[[2,1670]]" holds rows 2 and 1670 of a large table
        gradient = ours[key][[int(row) for row in rows.rstrip("]").split(",")]] if rows else ours[key]
        assert_close(name, gradient, value, tolerance=1e-3)


def test_adapters_of_the_instructed_model_beside_its_weights_and_merged(golden):
    """Both give the reference's tensors and agree within 1e-5; unmerging restores the file's weights."""
    path = golden / FILES["instruct"]
    reference = load_file(golden / "mini-a" / "instruct" / "reference.safetensors")
    images = reference["images"].transpose(0, 2, 3, 1)  # [3, H, W, 3]
    rows = jnp.stack([images[:2], np.stack([images[2], np.zeros_like(images[2])])])
    tokens, mask = (jnp.asarray(reference[name], jnp.int32) for name in ("input_ids", "attention_mask"))
    batch, live = reference_batch(rows, tokens, mask, IDS), reference["attention_mask"].astype(bool)
    loaded = load_emu(path, vision_head_dim=12, merge_lora=False)
    assert loaded.config.llama.lora_rank == 16 and loaded.config.llama.lora_targets == ("q", "k", "v", "o")
    config, beside = dataclasses.replace(loaded.config, loss_chunk=8), loaded.params
    plain, adapters = lora.separate(beside)
    single, merged = lora.merge_model(config, beside)
    found = {}
    for name, model, params in (("beside", config, beside), ("merged", single, merged)):
        named = jax.jit(emu.intermediates, static_argnames=("config", "ids"))(
            params, emu.initial_statistics(model), batch, config=model, ids=IDS
        )
        found[name] = {key: np.asarray(value) for key, value in named.items()}
        assert_close("hidden_states", found[name]["hidden_states"][live], reference["hidden_states"][live])
        assert_close("logits", found[name]["logits"][..., ::97][live], reference["logits_sample"][live])
        assert_close("ce_loss", found[name]["text_loss"], reference["ce_loss"])
    for key in ("hidden_states", "logits", "regress_pred", "text_loss", "regression_loss"):
        one, other = found["beside"][key], found["merged"][key]
        print(f"{key}: off by {np.abs(one - other).max() / np.abs(other).max():.1e} of the largest magnitude")
        assert_close(key, one, other, tolerance=1e-5)
    back = flatten(lora.merge(merged, adapters, -config.llama.lora_alpha))
    for name, value in flatten(plain).items():
        np.testing.assert_allclose(back[name], value, atol=1e-6, err_msg=name)
    kernel = "llama/blocks/attn/q/kernel"
    assert np.abs(flatten(merged)[kernel] - flatten(plain)[kernel]).max() > 1e-3, "the adapters change the weights"
