"""Initial weights have the distributions of the reference's own modules; `init="scaled"` differs where it should.

The reference's Causal Transformer is transformers' T5 decoder, whose cross-attention reads images of another width. The
tests build it from torch's and transformers' own classes and compare its initialisation with ours, key by key:

    python -m pytest -s tests/models/test_init.py        # prints the table
"""

import dataclasses
import math

import jax
import numpy as np
import pytest
from scipy.stats import ks_2samp

from configs import models
from emu_jax.checkpoints.convert import emu as published
from emu_jax.errors import UserError
from emu_jax.models import emu
from emu_jax.models.paths import flatten

DRAWS = 20_000  # maximum number of values of a parameter that are compared
ALIKE = 1e-4  # p-value below which two samples are taken to be of different distributions


def stand_in(**fields) -> emu.EmuConfig:
    """The published model with two layers, and narrow outside the Causal Transformer."""
    config = models.emu_14b()
    config.vision.update({"image_size": 28, "width": 352, "layers": 1, "heads": 4, "mlp_dim": 64})
    config.causal.layers = 2
    config.llama.update({"vocab_size": 64, "width": 320, "layers": 1, "heads": 4, "mlp_dim": 64})
    return emu.EmuConfig.from_dict(config.to_dict() | fields)


def ours(config: emu.EmuConfig) -> dict[str, np.ndarray]:
    """Initial parameters by published key, without those that the reference loads: EVA-CLIP's and LLaMA's."""
    params = jax.jit(emu.init, static_argnums=0)(config, jax.random.key(5))
    fresh = ("cformer.", "decoder.lm.stu_regress_head.")
    return {key: value for key, value in published.to_published(params, config) if key.startswith(fresh)}


@pytest.fixture(scope="module")
def theirs() -> dict[str, np.ndarray]:
    """Initial parameters of the reference's modules, built as in Emu1/models/causal_former.py and modeling_llama.py."""
    torch = pytest.importorskip("torch", reason="install .[convert]")
    transformers = pytest.importorskip("transformers", reason="install .[compare]")
    torch.manual_seed(0)
    c = stand_in()
    t5 = transformers.T5Config(
        vocab_size=8,
        d_model=c.causal.width,
        d_kv=c.causal.head_dim,
        d_ff=c.causal.mlp_dim,
        num_layers=1,
        num_decoder_layers=c.causal.layers,
        num_heads=c.causal.heads,
    )
    lm = transformers.T5ForConditionalGeneration(t5)
    for block in lm.decoder.block:
        cross = block.layer[1].EncDecAttention
        inner = c.causal.heads * c.causal.head_dim
        cross.k = torch.nn.Linear(c.vision.width, inner, bias=False)
        cross.v = torch.nn.Linear(c.vision.width, inner, bias=False)
    with torch.no_grad():
        lm.apply(lm._init_weights)
    modules = {
        "cformer.cformer.": lm.decoder,
        "cformer.projection.": torch.nn.Linear(c.causal.width, c.llama.width),
        "decoder.lm.stu_regress_head.": torch.nn.Linear(c.llama.width, c.llama.width, bias=False),
    }
    found = {"cformer.causal_tokens": torch.zeros(1, c.causal.queries, c.causal.width).normal_(mean=0.0, std=0.02)}
    for prefix, module in modules.items():
        found |= {prefix + name: value for name, value in module.state_dict().items() if "embed_tokens" not in name}
    return {key: value.detach().numpy() for key, value in found.items()}


def differing(got: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> list[str]:
    """The keys whose values have different distributions by the Kolmogorov-Smirnov test."""
    found = []
    for key in sorted(expected):
        chosen = np.random.default_rng(1).permutation(expected[key].size)[:DRAWS]
        a, b = (x[key].ravel()[chosen] for x in (got, expected))
        if ks_2samp(a, b).pvalue < ALIKE:
            found.append(key)
    return found


def describe(value: np.ndarray) -> str:
    return f"{value.mean():9.5f} {value.std():9.5f} {np.abs(value).max():9.5f} {np.linalg.norm(value):9.2f}"


@pytest.mark.slow
def test_fresh_weights_are_the_reference_s(theirs):
    """Keys, shapes and distributions are equal; prints mean, std, bound and norm of each."""
    got = ours(stand_in())
    assert {key: value.shape for key, value in got.items()} == {key: value.shape for key, value in theirs.items()}
    columns = f"{'mean':>9} {'std':>9} {'largest':>9} {'norm':>9}"
    print(f"\n{'':76} {'reference: ' + columns:>50} {'emu_jax: ' + columns:>50}")
    for key, value in theirs.items():
        print(f"{key:76} {describe(value):>50} {describe(got[key]):>50}")
    assert differing(got, theirs) == []


@pytest.mark.slow
def test_scaled_weights_differ_where_causal_py_says_so(theirs):
    """This also shows that the comparison distinguishes distributions."""
    cross = [
        f"cformer.cformer.block.{layer}.layer.1.EncDecAttention.{name}.weight" for layer in (0, 1) for name in "kv"
    ]
    heads = ["cformer.projection.bias", "cformer.projection.weight", "decoder.lm.stu_regress_head.weight"]
    assert differing(ours(stand_in(init="scaled")), theirs) == sorted(["cformer.causal_tokens", *cross, *heads])


@pytest.mark.long
@pytest.mark.parametrize("kind", ["causal", "bidirectional"])
def test_published_statistics(kind):
    """The reference's standard deviations within five standard errors, and the bounds of uniform parameters."""
    config = stand_in()
    config = dataclasses.replace(config, causal=dataclasses.replace(config.causal, kind=kind))
    params = flatten(jax.jit(emu.init, static_argnums=0)(config, jax.random.key(2)))
    normal = {
        "causal/queries": 0.02,
        "causal/relative_bias": 768**-0.5,
        "causal/blocks/self_attn/q/kernel": (768 * 64) ** -0.5,
        "causal/blocks/self_attn/k/kernel": 768**-0.5,
        "causal/blocks/cross_attn/q/kernel": (768 * 64) ** -0.5,
        "causal/blocks/cross_attn/k/kernel": 768**-0.5,  # not 352^-0.5, of what they read
        "causal/blocks/cross_attn/v/kernel": 768**-0.5,
        "causal/blocks/cross_attn/o/kernel": 768**-0.5,
        "causal/blocks/mlp/wi/kernel": 768**-0.5,
        "causal/blocks/mlp/wo/kernel": 3072**-0.5,
    }
    uniform = {
        "causal/projection/kernel": 768**-0.5,
        "causal/projection/bias": 768**-0.5,
        "llama/visual_head/kernel": 320**-0.5,
    }
    for name, std in normal.items():
        value = np.asarray(params[name])
        error = 5 / math.sqrt(value.size)  # of a normal sample's mean, in standard deviations
        assert abs(value.mean()) < error * std, f"{name}: mean {value.mean()}, expected 0"
        assert value.std() == pytest.approx(std, rel=error / math.sqrt(2)), f"{name}: std {value.std()}, expected {std}"
    for name, bound in uniform.items():
        value = np.asarray(params[name])
        std, error = bound / math.sqrt(3), 5 / math.sqrt(value.size)
        assert np.abs(value).max() <= bound, f"{name}: largest {np.abs(value).max()}, expected at most {bound}"
        assert abs(value.mean()) < error * std, f"{name}: mean {value.mean()}, expected 0"
        assert value.std() == pytest.approx(std, rel=error / math.sqrt(5)), f"{name}: std {value.std()}, expected {std}"
    constants = {name: value for name, value in params.items() if name.startswith("causal/") and "norm" in name}
    assert len(constants) == 4 and all((np.asarray(value) == 1).all() for value in constants.values())


def test_pooled_patches_start_as_torch_s_linear_does():
    config = stand_in()
    config = dataclasses.replace(config, causal=dataclasses.replace(config.causal, kind="pooled"))
    projection = emu.init(config, jax.random.key(0))["causal"]["projection"]
    for name, value in projection.items():
        assert float(abs(value).max()) <= 352**-0.5, name
        assert float(value.std()) == pytest.approx(352**-0.5 / math.sqrt(3), rel=0.15), name


def test_which_sizes_start_how():
    assert {name: size().init for name, size in models.SIZES.items()} == {
        "debug": "scaled",  # these learn from scratch
        "micro": "scaled",
        "mini": "scaled",
        "7b": "reference",
        "14b": "reference",
    }
    with pytest.raises(UserError, match=r"model\.init='torch' is unknown; choose one of reference, scaled"):
        stand_in(init="torch")
