"""LoRA adapters: their target projections, dropout of their inputs only, merging and unmerging."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs import models
from emu_jax.errors import UserError
from emu_jax.models import emu, layers, lora
from emu_jax.models.llama import PROJECTIONS
from emu_jax.models.paths import flatten, join, split
from emu_jax.models.quantise import KINDS
from tests.models.quantised import quantise_params
from tests.models.reference_batch import reference_batch

IDS = emu.SpecialIds(pad=64, img=65, img_end=66, image=67)
FOLDERS = {name: "attn" if name in "qkvo" else "mlp" for name in PROJECTIONS}


def adapted(**fields) -> emu.EmuConfig:
    model = models.debug().to_dict()
    model["llama"] |= {"lora_rank": 3, "lora_alpha": 6.0, **fields}
    return emu.EmuConfig.from_dict(model)


def plain(config: emu.EmuConfig) -> emu.EmuConfig:
    return dataclasses.replace(config, llama=dataclasses.replace(config.llama, lora_rank=0, lora_dropout=0.0))


def grown(config: emu.EmuConfig) -> emu.Params:
    """Initial parameters with random `lora_b`, which is initially 0."""
    params = flatten(emu.init(config, jax.random.key(0)))
    keys = jax.random.split(jax.random.key(1), len(params))
    drawn = {
        p: 0.1 * jax.random.normal(k, params[p].shape)
        for p, k in zip(params, keys, strict=True)
        if p.endswith("/lora_b")
    }
    return join(params | drawn, {})


def batch() -> emu.Batch:
    """Two rows of text without an image."""
    tokens = jnp.asarray(np.random.default_rng(0).integers(1, 60, (2, 12)), jnp.int32)
    return reference_batch(jnp.zeros((2, 1, 16, 16, 3), jnp.uint8), tokens, jnp.ones_like(tokens), IDS)


def logits(params: emu.Params, config: emu.EmuConfig) -> np.ndarray:
    found = jax.jit(emu.intermediates, static_argnames=("config", "ids"))(
        params, emu.initial_statistics(config), batch(), config=config, ids=IDS
    )
    return np.asarray(found["logits"])


# ---------------------------------------------------------------- target projections


@settings(max_examples=15)
@given(st.sets(st.sampled_from(PROJECTIONS), min_size=1))
def test_only_the_target_projections_have_adapters(targets):
    config = adapted(lora_targets=sorted(targets))
    shapes = {path: leaf.shape for path, leaf in flatten(emu.abstract(config)).items()}
    sizes = {name: (16, 16) for name in "qkvo"} | {"gate": (16, 24), "up": (16, 24), "down": (24, 16)}
    expected = {}
    for name in targets:
        where = f"llama/blocks/{FOLDERS[name]}/{name}"
        expected |= {f"{where}/lora_a": (2, sizes[name][0], 3), f"{where}/lora_b": (2, 3, sizes[name][1])}
    assert {path: shape for path, shape in shapes.items() if lora.is_adapter(path)} == expected
    without = {path: leaf.shape for path, leaf in flatten(emu.abstract(plain(config))).items()}
    assert {path: shape for path, shape in shapes.items() if path not in expected} == without


def test_configs_without_the_new_fields_are_the_paper_s():
    fields = adapted().to_dict()
    for name in ("lora_targets", "lora_dropout"):
        fields["llama"].pop(name)
    assert emu.EmuConfig.from_dict(fields).llama.lora_targets == ("q", "k", "v", "o")
    assert hash(adapted(lora_targets=["q"])) == hash(adapted(lora_targets=("q",))), "JSON gives lists"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"lora_targets": ("q", "gates")},
            r"lora_targets: 'gates' is no projection; did you mean gate\? expected some",
        ),
        (
            {"lora_targets": ()},
            r"model\.llama\.lora_targets=\(\); expected some of q, k, v, o, gate, up, down, each once",
        ),
        ({"lora_targets": ("q", "q")}, r"lora_targets=\('q', 'q'\); expected some of"),
        ({"lora_targets": "qv"}, r"lora_targets='qv'; expected some of .*, as in \('q', 'v'\)"),
        ({"lora_dropout": 1.0}, r"model\.llama\.lora_dropout=1\.0; expected 0 to below 1"),
        ({"lora_rank": -1}, r"model\.llama\.lora_rank=-1; expected 0"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(UserError, match=message):
        adapted(**fields)


# ---------------------------------------------------------------- dropout


def test_the_adapter_s_input_alone_is_dropped():
    """As in PEFT: x W + alpha / r * dropout(x) A B."""
    linear = layers.Linear(layers.nnx.Rngs(params=0), 8, 8, ("embed", "mlp"), "float32", adapter=(4, 2.0, 0.25))
    linear.lora_b[...] = jax.random.normal(jax.random.key(1), (4, 8))
    x, key = jax.random.normal(jax.random.key(2), (5, 8)), jax.random.key(3)
    kept = np.asarray(layers.dropout(x, 0.25, key))
    kernel, a, b = (np.asarray(leaf[...]) for leaf in (linear.kernel, linear.lora_a, linear.lora_b))
    assert 0 < (kept == 0).sum() < kept.size
    np.testing.assert_allclose(linear(x, key), x @ kernel + 0.5 * kept @ a @ b, atol=1e-5)
    np.testing.assert_allclose(linear(x), x @ kernel + 0.5 * x @ a @ b, atol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("remat", ["none", "full"])
def test_every_layer_and_projection_draws_its_own_mask(monkeypatch, remat):
    """Records the keys that the running program uses, backward pass included."""
    config = adapted(lora_targets=PROJECTIONS, lora_dropout=0.5, remat=remat)
    params, seen, dropout = grown(config), [], layers.dropout

    def recording(x, rate, key, **options):
        if key is not None:  # the attention's own has none
            jax.debug.callback(lambda data: seen.append(tuple(np.asarray(data).tolist())), jax.random.key_data(key))
        return dropout(x, rate, key, **options)

    monkeypatch.setattr(layers, "dropout", recording)
    adapters, rest = split(params, lora.is_adapter)
    positions = jnp.broadcast_to(jnp.arange(5), (1, 5))

    @jax.jit
    def gradient(adapters, key):
        def total(adapters):
            llama = emu.bind(config, join(adapters, rest)).llama
            return llama(jnp.ones((1, 5, 16)), positions, positions * 0 + 1, key=key).sum()

        return jax.grad(total)(adapters)

    jax.block_until_ready(gradient(adapters, jax.random.key(0)))
    jax.effects_barrier()
    print(f"{len(seen)} masks drawn")
    assert len(set(seen)) == 2 * 7, f"expected a key for each of 2 layers x 7 projections, got {len(set(seen))}"


@pytest.mark.slow
def test_dropout_follows_the_key_and_is_off_without_one():
    config = adapted(lora_dropout=0.5)
    params, statistics = grown(config), emu.initial_statistics(config)

    @jax.jit
    def loss(key):
        return emu.loss(params, statistics, batch(), config=config, ids=IDS, key=key)[0]

    off = emu.loss(params, statistics, batch(), config=config, ids=IDS)[0]
    without = adapted()
    assert float(off) == float(emu.loss(params, statistics, batch(), config=without, ids=IDS, key=jax.random.key(7))[0])
    first, again, other = (float(loss(jax.random.key(seed))) for seed in (0, 0, 1))
    assert first == again and len({first, other, float(off)}) == 3


# ---------------------------------------------------------------- merging


def test_unmerging_is_the_inverse_of_merging():
    config = adapted(lora_targets=("k", "down"))
    params, adapters = lora.separate(grown(config))
    merged = lora.merge(params, adapters, alpha=6.0)
    moved = {p for p, leaf in flatten(merged).items() if leaf is not flatten(params)[p]}
    assert moved == {"llama/blocks/attn/k/kernel", "llama/blocks/mlp/down/kernel"}, "others are shared"
    back = flatten(lora.merge(merged, adapters, alpha=-6.0))
    for path in moved:
        assert float(jnp.abs(flatten(merged)[path] - flatten(params)[path]).max()) > 0.01
        np.testing.assert_allclose(back[path], flatten(params)[path], atol=1e-6)


@pytest.mark.long
@pytest.mark.parametrize("targets", [("q", "k", "v", "o"), PROJECTIONS])
@pytest.mark.parametrize("kind", ["", "int8", "int4"])
def test_a_merged_model_says_the_same(targets, kind):
    config = adapted(lora_targets=targets)
    params = grown(config)
    if kind:
        config, params = adapted(lora_targets=targets, quantised=kind), quantise_params(params, kind)
        assert params["llama"]["blocks"]["attn"]["q"]["kernel"].dtype == KINDS[kind]
    beside = logits(params, config)
    single, merged = lora.merge_model(config, params)
    assert single.llama.lora_rank == 0 and not single.llama.quantised
    assert {p: x.shape for p, x in flatten(merged).items()} == {
        p: x.shape for p, x in flatten(emu.abstract(single)).items()
    }
    inside = logits(merged, single)
    off = np.abs(beside - inside).max() / np.abs(inside).max()
    print(f"off by {off:.1e} of the largest logit")
    assert off < 1e-5
    bare, _ = lora.separate(params)
    assert np.abs(beside - logits(bare, plain(config))).max() > 1e-2, "the adapters change the output"


def test_a_model_without_adapters_is_merged_already():
    config = plain(adapted())
    params = emu.init(config, jax.random.key(0))
    assert lora.merge_model(config, params) == (config, params)
