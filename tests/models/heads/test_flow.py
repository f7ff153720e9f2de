"""The flow-matching head against an analytic case: embeddings of a known mixture of Gaussians."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.models.heads.suite import WIDTH, loss_of, made

DEVIATION = 0.15
SHARE = 0.7  # of the first mode


def modes() -> jax.Array:
    """Two modes for each of two hidden states [2, 2, D], at distances of about 4 from one another."""
    return jax.random.rademacher(jax.random.key(3), (2, 2, WIDTH)).astype(jnp.float32)


def draw(key: jax.Array, count: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Which hidden state [B], the hidden states [B, 1, D] and the embeddings that follow [B, 1, D]."""
    keys = jax.random.split(key, 3)
    which = jax.random.randint(keys[0], (count,), 0, 2)
    first = jax.random.bernoulli(keys[1], SHARE, (count,))
    centres = modes()[which, jnp.where(first, 0, 1)]  # [B, D]
    embeddings = centres + DEVIATION * jax.random.normal(keys[2], centres.shape)
    return which, jax.nn.one_hot(which, WIDTH)[:, None], embeddings[:, None]


def trained(name: str, rate: float, **settings) -> jax.Array:
    """Samples [2, N, D] for the two hidden states, after training."""
    head, params, apply = made(name, **settings)
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, 1500))

    def loss(params, key):
        _, hidden, targets = draw(key, 128)
        return loss_of(head, apply, params, hidden, targets, jnp.ones((128, 1)), jax.random.fold_in(key, 1)).total / 128

    @jax.jit
    def train(params):
        def step(carry, number):
            params, state = carry
            changes, state = optimizer.update(jax.grad(loss)(params, jax.random.key(number)), state)
            return (optax.apply_updates(params, changes), state), None

        return jax.lax.scan(step, (params, optimizer.init(params)), jnp.arange(1500))[0][0]

    params = train(params)
    hidden = jnp.repeat(jnp.eye(2, WIDTH), 400, axis=0)
    keys = jax.random.split(jax.random.key(5), 800)
    sample = jax.jit(lambda params: apply(params, lambda module: head.sample(module, hidden, keys)))
    return sample(params).reshape(2, 400, WIDTH)


@pytest.mark.long
def test_samples_have_the_modes_and_moments_of_a_mixture():
    samples = np.asarray(trained("flow", 3e-3, width=64, steps=50))
    for which in range(2):
        found, centres = samples[which], np.asarray(modes()[which])
        distances = np.linalg.norm(found[:, None] - centres, axis=-1) / WIDTH**0.5  # [N, 2], per dimension
        nearest = distances.argmin(1)
        share = (nearest == 0).mean()
        print(f"hidden state {which}: share {share:.3f}, within {np.median(distances.min(1)):.3f} of a mode")
        assert abs(share - SHARE) < 0.08  # 3.5 standard errors of 400 draws
        assert np.median(distances.min(1)) < 1.5 * DEVIATION
        assert (distances.min(1) < 3 * DEVIATION).mean() > 0.95
        mean = SHARE * centres[0] + (1 - SHARE) * centres[1]
        np.testing.assert_allclose(found.mean(0), mean, atol=0.2)
        variance = SHARE * (1 - SHARE) * np.square(centres[0] - centres[1]) + DEVIATION**2
        np.testing.assert_allclose(found.var(0), variance, atol=0.2)


@pytest.mark.long
def test_l2_gives_the_mean_of_the_modes():
    samples = np.asarray(trained("l2", 2e-2))
    for which in range(2):
        centres = np.asarray(modes()[which])
        np.testing.assert_allclose(samples[which][0], SHARE * centres[0] + (1 - SHARE) * centres[1], atol=0.1)
        nearest = np.linalg.norm(samples[which][0] - centres, axis=-1).min() / WIDTH**0.5
        assert nearest > 2 * DEVIATION, "between the modes, where no embedding is"


def test_guidance_of_1_is_none_and_more_goes_further_from_the_mean_of_all():
    """v with a hidden state minus v without is scaled: at 1 the sample is that of no guidance."""
    plain, params, apply = made("flow")
    hidden, keys = jax.random.normal(jax.random.key(1), (3, WIDTH)), jax.random.split(jax.random.key(2), 3)
    found = {}
    for guidance in (1.0, 1.000001, 3.0):
        head, _, _ = made("flow", guidance=guidance)
        found[guidance] = apply(params, lambda module: head.sample(module, hidden, keys))  # noqa: B023
    np.testing.assert_allclose(found[1.0], found[1.000001], atol=1e-4)
    assert float(jnp.abs(found[3.0] - found[1.0]).max()) > 1e-4
    assert plain.guidance == 1


def test_the_number_of_steps_converges():
    """Euler's error falls with the number of steps: towards that of 256."""
    _, params, apply = made("flow")
    hidden, keys = jax.random.normal(jax.random.key(1), (3, WIDTH)), jax.random.split(jax.random.key(2), 3)
    samples = {}
    for steps in (4, 16, 256):
        head, _, _ = made("flow", steps=steps)
        sample = jax.jit(lambda params: apply(params, lambda module: head.sample(module, hidden, keys)))  # noqa: B023
        samples[steps] = sample(params)
    errors = [float(jnp.abs(samples[steps] - samples[256]).max()) for steps in (4, 16)]
    assert errors[1] < errors[0], errors
