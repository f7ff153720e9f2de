"""Every visual head of the registry: its loss, what it learns and its samples."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from configs import models
from emu_jax.errors import UserError
from emu_jax.models import emu
from emu_jax.models.heads.registry import PUBLISHED, build_head, head_names
from tests.models.heads.suite import WIDTH, loss_of, made

NAMES = head_names()
EVERY = pytest.mark.parametrize("name", NAMES)


def rows(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


WEIGHTS = jnp.array([[1.0, 1, 0, 0.5, 1], [0, 1, 1, 0, 0.25]])  # [B, S]


@EVERY
def test_the_loss_is_the_sum_of_its_terms_and_weights_count(name):
    head, params, apply = made(name)
    hidden, targets = rows(1, 2, 5, WIDTH), rows(2, 2, 5, WIDTH)
    total, terms = loss_of(head, apply, params, hidden, targets, WEIGHTS)
    assert terms.shape == (2, 5) and total.dtype == jnp.float32
    np.testing.assert_allclose(total, terms.sum(), rtol=1e-5)
    assert (np.asarray(terms)[np.asarray(WEIGHTS) == 0] == 0).all()
    # Where the weight is 0, neither hidden states nor targets matter.
    elsewhere = jnp.where(WEIGHTS[..., None] > 0, hidden, 9.0), jnp.where(WEIGHTS[..., None] > 0, targets, -9.0)
    np.testing.assert_allclose(loss_of(head, apply, params, *elsewhere, WEIGHTS)[1], terms, rtol=1e-4, atol=1e-6)
    # Twice the weights are twice the loss.
    np.testing.assert_allclose(loss_of(head, apply, params, hidden, targets, 2 * WEIGHTS)[0], 2 * total, rtol=1e-5)


@EVERY
def test_nothing_to_predict_has_no_gradient(name):
    head, params, apply = made(name)
    none = jnp.zeros_like(WEIGHTS)
    loss, gradient = jax.value_and_grad(
        lambda p: loss_of(head, apply, p, rows(1, 2, 5, WIDTH), rows(2, 2, 5, WIDTH), none)[0]
    )(params)
    assert float(loss) == 0
    assert all(float(jnp.abs(leaf).max()) == 0 for leaf in jax.tree.leaves(gradient)), gradient


@EVERY
def test_it_learns_a_map_and_samples_it(name):
    """Embeddings of length 2 sqrt(D) that follow from the hidden state: samples point to them and have their length."""
    # Codes of one dimension each, and the likeliest ones: draws of coarse codes scatter far.
    fine = {"codes": {"codes": 8, "groups": 16, "temperature": 0.0}}
    head, params, apply = made(name, **fine.get(name, {}))
    matrix = jax.random.orthogonal(jax.random.key(7), WIDTH)

    def batch(seed):
        hidden = rows(seed, 16, 4, WIDTH)
        return hidden, 2 * math.sqrt(WIDTH) * (hidden @ matrix) / jnp.linalg.norm(hidden, axis=-1, keepdims=True)

    optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, 600))

    @jax.jit
    def step(params, state, number):
        hidden, targets = batch(number)
        key = jax.random.key(number)
        loss = lambda p: loss_of(head, apply, p, hidden, targets, jnp.ones((16, 4)), key)[0] / 64  # noqa: E731
        value, gradient = jax.value_and_grad(loss)(params)
        changes, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, changes), state, value

    state, losses = optimizer.init(params), []
    for number in range(600):
        params, state, value = step(params, state, number)
        losses.append(float(value))
    assert np.mean(losses[-20:]) < 0.6 * np.mean(losses[:20]), (losses[:3], losses[-3:])
    hidden, targets = batch(10_000)
    keys = jax.random.split(jax.random.key(1), 16)
    found = apply(params, lambda module: head.sample(module, hidden[:, 0], keys))
    cosines = (
        (found * targets[:, 0]).sum(-1) / jnp.linalg.norm(found, axis=-1) / jnp.linalg.norm(targets[:, 0], axis=-1)
    )
    lengths = jnp.linalg.norm(found, axis=-1) / jnp.linalg.norm(targets[:, 0], axis=-1)
    print(name, "cosine", float(cosines.mean()), "length", float(lengths.mean()))
    assert float(cosines.mean()) > (0.8 if head.random else 0.9)  # a draw scatters around the answer
    assert 0.8 < float(lengths.mean()) < 1.2


@EVERY
def test_a_sample_depends_on_its_own_row_alone(name):
    head, params, apply = made(name)
    hidden, keys = rows(1, 4, WIDTH), jax.random.split(jax.random.key(1), 4)
    together = apply(params, lambda module: head.sample(module, hidden, keys))
    for row in range(4):
        one = apply(params, lambda module: head.sample(module, hidden[row : row + 1], keys[row : row + 1]))  # noqa: B023
        np.testing.assert_allclose(one[0], together[row], rtol=1e-4, atol=1e-5)
    again = apply(params, lambda module: head.sample(module, hidden, jax.random.split(jax.random.key(2), 4)))
    assert head.random == (float(jnp.abs(again - together).max()) > 1e-3)


@EVERY
def test_multiply_adds_are_the_compiler_s(name):
    """Within 5%, at a width where products are nearly all of the work."""
    head, _, _ = made(name)
    width, shape = 128, (2, 8)
    module = nnx.eval_shape(lambda: head.make(nnx.Rngs(0), width, "float32", "scaled"))
    graph, params = nnx.split(module)

    def loss(params, hidden, targets):
        return head.loss(nnx.merge(graph, params), hidden, targets, jnp.ones(shape), jax.random.key(0)).total

    like = jax.ShapeDtypeStruct((*shape, width), jnp.float32)
    counted = jax.jit(loss).lower(params, like, like).compile().cost_analysis()["flops"] / 2 / math.prod(shape)
    pairs = math.prod(shape) * width if head.rows_mix else 0  # InfoNCE's products of all pairs
    assert head.multiply_adds(width) + pairs == pytest.approx(counted, rel=0.05), counted


def test_names_and_settings():
    assert NAMES[:8] == ["l2", "l1", "smooth_l1", "cosine", "infonce", "flow", "codes", "queries"]
    assert build_head("model.visual_head", {"name": "l2"}) == PUBLISHED
    flow = build_head("model.visual_head", {"name": "flow", "steps": 50, "guidance": 2})
    assert (flow.steps, flow.guidance, flow.blocks) == (50, 2, 3)
    assert build_head("model.visual_head", dataclasses.asdict(flow)) == flow


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "model.visual_head.name is missing; expected the name of a visual head, as in model.visual_head.name=l2"),
        ({"name": "l3"}, "model.visual_head.name='l3' is no visual head; did you mean l2?"),
        ({"name": "l2", "steps": 3}, "model.visual_head.steps is no field of Regression; did you mean name?"),
        ({"name": "flow", "steps": 0}, "model.visual_head.steps=0; expected 1 or more"),
        ({"name": "flow", "steps": "x"}, "model.visual_head.steps='x': expected int, got str"),
        ({"name": "flow", "guidance": 2.0, "drop_hidden": 0.0}, "model.visual_head.guidance=2.0 needs"),
        ({"name": "flow", "drop_hidden": 1.0}, "model.visual_head.drop_hidden=1.0; expected 0 to below 1"),
        ({"name": "flow", "target_scale": 0.0}, "model.visual_head.target_scale=0.0; expected more than 0"),
        ({"name": "codes", "width": 10, "groups": 4}, "model.visual_head.width=10 does not divide into"),
        ({"name": "codes", "temperature": -1.0}, "model.visual_head.temperature=-1.0; expected 0 or more"),
        ({"name": "infonce", "temperature": 0.0}, "model.visual_head.temperature=0.0; expected 0.01 to 10"),
    ],
)
def test_settings_that_cannot_work(fields, said):
    with pytest.raises(UserError) as caught:
        build_head("model.visual_head", fields)
    assert str(caught.value).startswith(said) and "\n" not in str(caught.value)


@EVERY
def test_a_config_keeps_its_head(name):
    config = models.debug()
    config.visual_head.name = name
    built = emu.EmuConfig.from_dict(config)
    assert built.visual_head.name == name
    assert emu.EmuConfig.from_dict(built.to_dict()) == built
    assert hash(built) == hash(emu.EmuConfig.from_dict(config))
