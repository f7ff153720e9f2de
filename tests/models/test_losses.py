"""Means over tokens and over sources, against plain numpy on the model's own logits and predictions."""

import dataclasses

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from configs import models
from emu_jax.errors import UserError
from emu_jax.models import emu
from emu_jax.models.losses import SourceWeights, source_scales
from emu_jax.sharding import make_mesh
from emu_jax.train.optimizer import OptimizerConfig
from emu_jax.train.state import create_state
from tests.models.reference_batch import reference_batch
from tests.train import tiny
from tests.train.tasks import compiled_step, interleaved

IDS = emu.SpecialIds(pad=64, img=65, img_end=66, image=67)
CONFIG = emu.EmuConfig.from_dict(models.debug())
SOURCES = dataclasses.replace(CONFIG, loss_mean="sources", regression_loss_weight=2.0)
TOKENS = dataclasses.replace(SOURCES, loss_mean="tokens")
PARAMS = emu.init(CONFIG, jax.random.key(0))
STATISTICS = emu.initial_statistics(CONFIG)
LOSS = jax.jit(emu.loss, static_argnames=("config", "ids", "sources"))
GRADIENT = jax.jit(jax.grad(emu.loss, has_aux=True), static_argnames=("config", "ids", "sources"))
IMAGE = [IDS.img, *[IDS.image] * 4, IDS.img_end]
ROWS = [[1, 5, 9, *IMAGE, 12, 2], [1, *IMAGE, 30, 31, 2], [1, 40, 41, 42, 43, 44, 45, 46, 47, 2]]
LENGTH = 12
WEIGHTED = (SourceWeights("web", 1.0, 0.5), SourceWeights("pairs", 0.3, 2.0), SourceWeights("chats", 1.0, 0.0))


def batch(rows: list[list[int]] = ROWS) -> emu.Batch:
    tokens = np.array([row + [IDS.pad] * (LENGTH - len(row)) for row in rows], np.int32)
    images = np.random.default_rng(0).integers(0, 256, (len(rows), 1, 16, 16, 3), np.uint8)
    return reference_batch(jnp.asarray(images), jnp.asarray(tokens), jnp.asarray(tokens != IDS.pad, jnp.int32), IDS)


def of_sources(
    batch: emu.Batch, numbers: np.ndarray, weights: tuple[SourceWeights, ...], scale: np.ndarray
) -> emu.Batch:
    """The batch with positions [B, S] of these sources and position weights times theirs, as in the pipeline."""
    text, visual = (np.array([getattr(source, kind) for source in weights]) for kind in ("text", "visual"))
    return dataclasses.replace(
        batch,
        source_ids=jnp.asarray(numbers, jnp.int32),
        text_weights=jnp.asarray(batch.text_weights * text[numbers] * scale, jnp.float32),
        visual_weights=jnp.asarray(batch.visual_weights * visual[numbers] * scale, jnp.float32),
    )


@pytest.fixture(scope="module")
def terms() -> tuple[np.ndarray, np.ndarray]:
    """The loss of every position, [B, S]: -log p of its token, and the squared distance of its embedding."""
    found = emu.intermediates(PARAMS, STATISTICS, batch(), config=CONFIG, ids=IDS)
    logits, tokens = np.asarray(found["logits"], np.float64)[:, :-1], np.asarray(batch().tokens)[:, 1:]
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    text = -np.take_along_axis(log_p, tokens[..., None], axis=-1)[..., 0]
    distance = np.square(np.asarray(found["regress_pred"] - found["regress_target"], np.float64)).mean(-1)
    return tuple(np.pad(x, ((0, 0), (1, 0))) for x in (text, distance))


def oracle(values: np.ndarray, weights: np.ndarray, numbers: np.ndarray, factors: list[float]) -> float:
    """The mean of the present sources' own weighted means, weighted by their factors."""
    total, present = 0.0, 0.0
    for number, factor in enumerate(factors):
        own = weights * (numbers == number)
        if own.sum() > 0:
            total += factor * (values * own).sum() / own.sum()
            present += factor
    return total / present if present else 0.0


@pytest.mark.parametrize("weights", [tuple(map(SourceWeights, "abc")), WEIGHTED], ids=["ones", "weighted"])
@hypothesis.settings(max_examples=40)
@hypothesis.given(data=st.data())
def test_each_source_s_own_mean(terms, weights, data):
    """For any assignment of documents to sources, some of them absent, and any weights of documents."""
    numbers = np.array([data.draw(st.integers(0, 2)) for _ in ROWS])[:, None].repeat(LENGTH, 1)
    scale = np.array([data.draw(st.sampled_from([0.0, 0.25, 1.0, 3.0])) for _ in ROWS])[:, None]
    some = of_sources(batch(), numbers, weights, scale)
    total, (metrics, _) = LOSS(PARAMS, STATISTICS, some, config=SOURCES, ids=IDS, sources=weights)
    expected = [
        oracle(values, np.asarray(w), numbers, [getattr(source, kind) for source in weights])
        for values, w, kind in zip(terms, (some.text_weights, some.visual_weights), ("text", "visual"), strict=True)
    ]
    np.testing.assert_allclose([metrics["text_loss"], metrics["regression_loss"]], expected, rtol=2e-4, atol=1e-6)
    assert float(total) == pytest.approx(expected[0] + 2.0 * expected[1], rel=2e-4, abs=1e-6)
    for number, source in enumerate(weights):
        for kind, values, w in zip(
            ("text", "regression"), terms, (some.text_weights, some.visual_weights), strict=True
        ):
            own = np.asarray(w) * (numbers == number)
            mean = (values * own).sum() / own.sum() if own.sum() else np.nan
            np.testing.assert_allclose(metrics[f"{kind}_loss/{source.name}"], mean, rtol=2e-4)


def test_source_scales_by_hand():
    np.testing.assert_allclose(source_scales(jnp.array([6.0, 2.0, 0.0]), [1.0, 0.5, 1.0]), [1 / 9, 1 / 6, 0])
    np.testing.assert_array_equal(source_scales(jnp.zeros(2), [1.0, 1.0]), [0, 0])
    np.testing.assert_array_equal(source_scales(jnp.array([5.0, 0.0]), [0.0, 1.0]), [0, 0])


def test_the_metrics_of_sources_are_the_same_under_either_mean():
    numbers = np.array([0, 1, 2])[:, None].repeat(LENGTH, 1)
    some = of_sources(batch(), numbers, WEIGHTED, np.ones((3, 1)))
    found = [
        LOSS(PARAMS, STATISTICS, some, config=config, ids=IDS, sources=WEIGHTED)[1][0] for config in (TOKENS, SOURCES)
    ]
    names = [name for name in found[0] if "/" in name]
    assert len(names) == 6
    for name in names:
        np.testing.assert_allclose(found[0][name], found[1][name], rtol=1e-5, err_msg=name)
    assert float(found[0]["text_loss"]) != pytest.approx(float(found[1]["text_loss"]), rel=1e-3)


@pytest.mark.long
@pytest.mark.parametrize("sources", [(), (SourceWeights("one", 0.3, 0.7),)])
def test_one_source_is_the_mean_over_tokens(sources):
    """Bitwise, including gradients; batches of one source have no source ids."""
    some = batch()
    if sources:
        some = of_sources(some, np.zeros((3, LENGTH), int), sources, np.ones((3, 1)))
        assert float(some.text_weights.max()) == pytest.approx(0.3)
    got, expected = (
        GRADIENT(PARAMS, STATISTICS, some, config=config, ids=IDS, sources=sources) for config in (SOURCES, TOKENS)
    )
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_a_source_of_weight_0_teaches_nothing():
    """The gradient is that of the batch without the source's document."""
    weights = (SourceWeights("web"), SourceWeights("off", 0.0, 0.0))
    numbers = np.array([0, 1, 0])[:, None].repeat(LENGTH, 1)
    with_it = of_sources(batch(), numbers, weights, np.ones((3, 1)))
    without = of_sources(batch([ROWS[0], ROWS[2], ROWS[2]]), numbers * 0, weights, np.array([[1], [1], [0]]))
    images = batch().images
    without = dataclasses.replace(without, images=jnp.stack([images[0], images[2], images[2]]))
    got, expected = (
        GRADIENT(PARAMS, STATISTICS, some, config=SOURCES, ids=IDS, sources=weights)[0] for some in (with_it, without)
    )
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.slow
def test_accumulated_micro_batches_are_the_whole_batch():
    """Losses are divided by the whole batch's totals, even when a source is in only one micro-batch."""
    rows = [ROWS[0], ROWS[1], ROWS[2], ROWS[0]]
    numbers = np.array([0, 1, 2, 0])[:, None].repeat(LENGTH, 1)
    some = of_sources(batch(rows), numbers, WEIGHTED, np.array([[1.0], [1.0], [2.0], [0.5]]))
    found = []
    for count in (1, 2):
        fields = tiny.get_config().optimizer
        fields.accumulate_steps = count
        config = OptimizerConfig.from_dict(fields)
        task = interleaved(SOURCES, IDS, config, sources=WEIGHTED)
        state = create_state(task, config, 0, make_mesh({}, jax.devices()[:1]))
        found.append(compiled_step(task, config, state, some)(state, some))
    (expected, metrics), (got, metrics_parts) = found
    names = ["loss", "text_loss", "regression_loss", "grad_norm", "text_loss/web", "text_loss/pairs", "text_loss/chats"]
    for name in [*names, "regression_loss/web", "regression_loss/pairs"]:
        assert float(metrics_parts[name]) == pytest.approx(float(metrics[name]), rel=1e-5), name
    for a, b in zip(jax.tree.leaves(expected.params), jax.tree.leaves(got.params), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.slow
def test_image_tokens_may_be_labels(terms):
    """[IMG] with a weight is a label like any token; the gradient is that of the plain cross-entropy."""
    some = batch()
    learnt = np.asarray(some.tokens == IDS.img)
    weights = np.asarray(some.text_weights) + 0.5 * learnt
    some = dataclasses.replace(some, text_weights=jnp.asarray(weights, jnp.float32))
    assert learnt.sum() == 2
    _, (metrics, _) = LOSS(PARAMS, STATISTICS, some, config=CONFIG, ids=IDS)
    assert float(metrics["text_loss"]) == pytest.approx((terms[0] * weights).sum() / weights.sum(), rel=1e-4)

    def plain(params: dict) -> jax.Array:
        logits = emu.intermediates(params, STATISTICS, some, config=CONFIG, ids=IDS)["logits"][:, :-1]
        log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), some.tokens[:, 1:, None], axis=-1)[..., 0]
        return -(log_p * weights[:, 1:]).sum() / weights.sum()

    text_alone = dataclasses.replace(CONFIG, regression_loss_weight=0.0)
    got = GRADIENT(PARAMS, STATISTICS, some, config=text_alone, ids=IDS)[0]
    expected = jax.jit(jax.grad(plain))(PARAMS)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    assert float(got["llama"]["lm_head"]["kernel"][:, IDS.img].min()) < 0.0, "[IMG] is pulled up somewhere"


def test_what_cannot_be():
    with pytest.raises(UserError, match=r"model\.loss_mean='rows' is unknown; choose one of tokens, sources"):
        dataclasses.replace(CONFIG, loss_mean="rows")
    with pytest.raises(UserError, match=r"source web: weights -1 \(text\) and 1\.0 \(visual\); expected numbers of 0"):
        SourceWeights("web", text=-1)
