"""The interleaved-sequence loss: packing, padding, masks, parts, and the published sizes."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import models
from emu_jax.errors import UserError
from emu_jax.models import emu
from tests.models.reference_batch import reference_batch

CONFIG = emu.EmuConfig.from_dict(models.debug())
IDS = emu.SpecialIds(pad=64, img=65, img_end=66, image=67)
QUERIES = CONFIG.causal.queries
IMAGE_TOKENS = [IDS.img, *[IDS.image] * QUERIES, IDS.img_end]
PARAMS = emu.init(CONFIG, jax.random.key(0))
STATISTICS = emu.initial_statistics(CONFIG)
LOSS = jax.jit(emu.loss, static_argnames=("config", "ids", "train"))
GRADIENT = jax.jit(jax.grad(emu.loss, has_aux=True), static_argnames=("config", "ids", "train"))


def random_images(count: int, seed: int = 0) -> np.ndarray:
    size = CONFIG.vision.image_size
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), np.uint8)


def make_batch(rows: list[list[list[int]]], images: np.ndarray, length: int) -> emu.Batch:
    """A batch of rows of documents of token ids, with images [B, I, height, width, 3]."""
    tokens = np.full((len(rows), length), IDS.pad, np.int32)
    segments = np.zeros((len(rows), length), np.int32)
    for row, documents in enumerate(rows):
        flat = [token for document in documents for token in document]
        tokens[row, : len(flat)] = flat
        segments[row, : len(flat)] = np.repeat(np.arange(len(documents)) + 1, [len(d) for d in documents])
    return reference_batch(jnp.asarray(images), jnp.asarray(tokens), jnp.asarray(segments), IDS)


def loss_sums(batch: emu.Batch, params=PARAMS, config=CONFIG) -> tuple[float, float]:
    """Both losses before they are divided by their weights."""
    ones = (jnp.ones(()), jnp.ones(()), jnp.ones(0), jnp.ones(0))
    _, (metrics, _) = LOSS(params, STATISTICS, batch, config=config, ids=IDS, train=False, normalisers=ones)
    return float(metrics["text_loss"]), float(metrics["regression_loss"])


FIRST = [1, 5, 9, *IMAGE_TOKENS, 12, 2]
SECOND = [1, *IMAGE_TOKENS, *IMAGE_TOKENS, 30, 31, 32, 2]
TEXT_ONLY = [1, 40, 41, 42, 2]


def test_labels_and_targets_of_the_reference():
    batch = make_batch([[[1, 5, *IMAGE_TOKENS, 2]]], random_images(1)[None], 12)
    np.testing.assert_array_equal(batch.tokens[0], [1, 5, 65, 67, 67, 67, 67, 66, 2, 64, 64, 64])
    np.testing.assert_array_equal(batch.slots[0], [-1, -1, -1, 0, 0, 0, 0, -1, -1, -1, -1, -1])
    np.testing.assert_array_equal(batch.text_weights[0], [0, 1, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0])
    np.testing.assert_array_equal(batch.visual_weights[0], [0, 0, 0, 1, 1, 1, 1, 1, 0, 0, 0, 0])


@pytest.mark.long
def test_a_packed_row_costs_what_its_documents_cost_alone():
    images = random_images(3)
    packed = make_batch([[FIRST, SECOND, TEXT_ONLY]], images[None], 48)
    alone = [
        make_batch([[FIRST]], images[None, :1], 16),
        make_batch([[SECOND]], images[None, 1:], 32),
        make_batch([[TEXT_ONLY]], images[None, :1], 8),
    ]
    expected = np.sum([loss_sums(batch) for batch in alone], axis=0)
    np.testing.assert_allclose(loss_sums(packed), expected, rtol=1e-5)


def test_padding_tokens_and_image_slots_change_nothing():
    images = random_images(4)
    tight = make_batch([[FIRST]], images[None, :1], len(FIRST))
    loose = make_batch([[FIRST]], images[None], 40)
    np.testing.assert_allclose(loss_sums(loose), loss_sums(tight), rtol=1e-5)


def test_documents_may_share_an_image_slot():
    images = random_images(1)
    shared = make_batch([[FIRST, FIRST]], images[None], 32)
    shared = dataclasses.replace(shared, slots=jnp.minimum(shared.slots, 0))
    twice = make_batch([[FIRST, FIRST]], np.concatenate([images, images])[None], 32)
    np.testing.assert_allclose(loss_sums(shared), loss_sums(twice), rtol=1e-6)


@pytest.mark.long
def test_regression_is_exactly_zero_without_images():
    batch = make_batch([[TEXT_ONLY, TEXT_ONLY]], random_images(1)[None], 16)
    grads, (metrics, _) = GRADIENT(PARAMS, STATISTICS, batch, config=CONFIG, ids=IDS)
    assert float(metrics["regression_loss"]) == 0.0
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(grads))
    assert float(jnp.abs(grads["vision"]["patch_embed"]["kernel"]).max()) == 0.0


@pytest.mark.long
def test_regression_targets_receive_no_gradient():
    """Without the text loss and with predictions of 0, no gradient flows to the encoder through the targets."""
    batch = make_batch([[FIRST]], random_images(1)[None], 16)
    config = dataclasses.replace(CONFIG, text_loss_weight=0.0)
    params = jax.tree.map(lambda leaf: leaf, PARAMS)
    params["llama"]["visual_head"]["kernel"] = jnp.zeros_like(params["llama"]["visual_head"]["kernel"])
    grads, _ = GRADIENT(params, STATISTICS, batch, config=config, ids=IDS)
    assert float(jnp.abs(grads["llama"]["visual_head"]["kernel"]).max()) > 0.0
    assert float(jnp.abs(grads["vision"]["patch_embed"]["kernel"]).max()) == 0.0


def test_noise_is_on_what_is_read_of_predicted_images_alone():
    batch = make_batch([[FIRST]], random_images(1)[None], 16)
    noisy = dataclasses.replace(CONFIG, input_noise=0.5)

    def loss(config, batch=batch, params=PARAMS, **options):
        return emu.loss(params, STATISTICS, batch, config=config, ids=IDS, **options)[1][0]

    key = jax.random.key(1)
    clean, found = loss(CONFIG, key=key), loss(noisy, key=key)
    assert abs(float(found["regression_loss"] - clean["regression_loss"])) > 1e-4
    assert float(found["effective_rank"]) == float(clean["effective_rank"])
    # Targets are clean: with predictions of 0 the loss is their square, whatever is read.
    silent = jax.tree.map(lambda leaf: leaf, PARAMS)
    silent["llama"]["visual_head"]["kernel"] = jnp.zeros_like(silent["llama"]["visual_head"]["kernel"])
    squares = [float(loss(config, params=silent, key=key)["regression_loss"]) for config in (CONFIG, noisy)]
    assert squares[0] == squares[1] > 0
    # Without a key, as on held-out data, and where images are only read, there is none.
    assert float(loss(noisy)["loss"]) == float(loss(CONFIG)["loss"])
    seen = dataclasses.replace(batch, visual_weights=jnp.zeros_like(batch.visual_weights))
    assert float(loss(noisy, seen, key=key)["text_loss"]) == float(loss(CONFIG, seen, key=key)["text_loss"])
    with pytest.raises(UserError, match=r"model\.input_noise=-1\.0; expected 0 or more"):
        dataclasses.replace(CONFIG, input_noise=-1.0)


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_scheduled_sampling_reads_the_model_s_own_predictions(share):
    """In two explicit passes: at a predicted <image>, the second reads what the first predicts one position before."""
    images = random_images(1)
    batch = make_batch([[FIRST]], images[None], 16)
    sampled = dataclasses.replace(CONFIG, scheduled_sampling=share)
    key = jax.random.key(3)
    found = emu.loss(PARAMS, STATISTICS, batch, config=sampled, ids=IDS, key=key)[1][0]

    model = emu.bind(CONFIG, PARAMS)
    embeddings = emu.encode_images(PARAMS, STATISTICS, images, config=CONFIG)
    inputs, positions = emu.interleave(model, embeddings, batch, IDS)
    llama = model.llama
    own = llama.visual_head(llama(inputs, positions, batch.segments))[0]  # [S, D]
    drawn = np.asarray(jax.random.bernoulli(jax.random.split(jax.random.fold_in(key, 5))[1], share, (1, 16, 1)))[
        0, :, 0
    ]
    places = [place for place in range(16) if int(batch.tokens[0, place]) == IDS.image and drawn[place]]
    assert 0 < len(places) <= QUERIES and (share == 1.0) == (len(places) == QUERIES), places
    read = inputs
    for place in places:
        read = read.at[0, place].set(own[place - 1])
    predicted = llama.visual_head(llama(read, positions, batch.segments))[0]
    targets = [place for place in range(16) if batch.visual_weights[0, place] > 0]
    errors = [jnp.square(predicted[place - 1] - inputs[0, place]).mean() for place in targets]
    assert float(found["regression_loss"]) == pytest.approx(float(np.mean(errors)), rel=1e-5)
    # Held-out data are read as they are.
    held_out = [emu.loss(PARAMS, STATISTICS, batch, config=c, ids=IDS)[0] for c in (CONFIG, sampled)]
    assert float(held_out[0]) == float(held_out[1])
    with pytest.raises(UserError, match=r"model\.scheduled_sampling=1\.5; expected a share of 0 to 1"):
        dataclasses.replace(CONFIG, scheduled_sampling=1.5)


@pytest.mark.long
@pytest.mark.parametrize("chunk", [1, 7, 48, 1000])
def test_loss_chunks_do_not_change_the_loss(chunk):
    batch = make_batch([[FIRST, SECOND]], random_images(3)[None], 48)
    config = dataclasses.replace(CONFIG, loss_chunk=chunk)
    np.testing.assert_allclose(loss_sums(batch, config=config), loss_sums(batch), rtol=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        {"unroll": True},
        *({"remat": kept} for kept in ("full", "dots")),
        *(pytest.param({"remat": kept}, marks=pytest.mark.long) for kept in ("attention", "offload")),
    ],
)
def test_how_it_is_computed_changes_no_gradient(change):
    fields = models.debug()
    for part in (fields.vision, fields.causal, fields.llama):
        part.remat = change.get("remat", "none")
    fields.unroll = change.get("unroll", False)
    batch = make_batch([[FIRST, SECOND]], random_images(3)[None], 48)

    def gradients(config: emu.EmuConfig):
        return GRADIENT(PARAMS, STATISTICS, batch, config=config, ids=IDS)[0]

    got, expected = gradients(emu.EmuConfig.from_dict(fields)), gradients(CONFIG)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.long
def test_standardised_embeddings_have_unit_variance_and_running_statistics():
    config = dataclasses.replace(CONFIG, standardise=True)
    images = random_images(6)[None]
    batch = make_batch([[[1, *IMAGE_TOKENS * 6, 2]]], images, 48)
    _, (_, statistics) = LOSS(PARAMS, STATISTICS, batch, config=config, ids=IDS)
    assert float(statistics["count"]) == 1.0
    embeds = emu.encode_images(PARAMS, statistics, jnp.asarray(images[0]), config=config)
    np.testing.assert_allclose(embeds.mean(0), 0.0, atol=1e-3)
    np.testing.assert_allclose(embeds.var(0).mean(), 1.0, atol=0.05)


@pytest.mark.long
def test_dropout_needs_a_key_and_changes_the_loss():
    fields = models.debug()
    fields.causal.dropout, fields.vision.drop_path = 0.5, 0.5
    config = emu.EmuConfig.from_dict(fields)
    batch = make_batch([[FIRST]], random_images(1)[None], 16)

    def total(key):
        return float(LOSS(PARAMS, STATISTICS, batch, config=config, ids=IDS, key=key)[0])

    assert total(None) == pytest.approx(float(LOSS(PARAMS, STATISTICS, batch, config=CONFIG, ids=IDS)[0]), rel=1e-6)
    assert total(jax.random.key(1)) != total(jax.random.key(2))


@pytest.mark.long
def test_logits_of_the_whole_batch_never_exist():
    """The compiled gradient has no float32 [B, S, V]."""
    batch = make_batch([[FIRST, SECOND]] * 4, np.stack([random_images(3)] * 4), 48)
    gradient = jax.grad(emu.loss, has_aux=True)
    text = jax.jit(lambda p: gradient(p, STATISTICS, batch, config=CONFIG, ids=IDS)).lower(PARAMS).compile().as_text()
    for positions in (47, 48):
        assert f"f32[4,{positions},68]" not in text
    assert "f32[4,16,68]" in text, "the chunk's logits"


def test_published_sizes_on_abstract_shapes():
    parts = {
        name: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
        for name, tree in emu.abstract(emu.EmuConfig.from_dict(models.emu_14b())).items()
    }
    assert round(sum(parts.values()) / 1e9, 1) == 14.2
    assert round(parts["vision"] / 1e9, 2) == 1.01
    assert round(parts["llama"] / 1e9, 2) == 13.04


@pytest.mark.parametrize(
    ("part", "field", "value", "message"),
    [
        ("vision", "patch_size", 7, r"model\.vision\.image_size=16 is not a multiple of model\.vision\.patch_size=7"),
        ("llama", "widht", 7, r"model\.llama\.widht is no field of LlamaConfig; did you mean width\?"),
        (
            "causal",
            "remat",
            "some",
            r"model\.causal\.remat='some' is unknown; choose one of "
            r"\['attention', 'auto', 'dots', 'full', 'none', 'offload'\]",
        ),
        ("", "dtype", "float16", r"model\.dtype='float16'; expected float32 or bfloat16"),
    ],
)
def test_wrong_settings_fail_at_construction(part, field, value, message):
    fields = models.debug().to_dict()
    (fields[part] if part else fields)[field] = value
    with pytest.raises(UserError, match=message):
        emu.EmuConfig.from_dict(fields)


def test_config_round_trips_through_a_plain_dict():
    assert emu.EmuConfig.from_dict(CONFIG.to_dict()) == CONFIG
