"""Samplers: what every table must do, whatever the number of steps; a model that knows the answer; one compilation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emu_jax.errors import UserError
from emu_jax.generate import samplers
from emu_jax.generate.samplers import SAMPLERS, make_table, sample
from emu_jax.models import unet
from emu_jax.models.diffusion import Schedule, add_noise, loss_weights

SCHEDULE = Schedule()
CONFIG = unet.UNetConfig(
    block_channels=(8, 8), attention_blocks=(True, False), layers_per_block=1, heads=2, condition_dim=8, groups=4
)


@given(sampler=st.sampled_from(sorted(SAMPLERS)), steps=st.integers(1, 200))
def test_tables(sampler, steps):
    table = make_table(sampler, SCHEDULE, steps)
    rows = steps + (sampler == "pndm" and steps > 1)
    assert table.timestep.shape == (rows,) and table.history_coef.shape == (rows, 4)
    assert (np.diff(table.timestep) <= 0).all() and table.timestep.min() >= 0
    assert table.timestep.max() < SCHEDULE.train_steps
    for field in ("scale", "from_x", "from_eps", "x_coef", "history_coef"):
        assert np.isfinite(getattr(table, field)).all(), field


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
def test_a_model_that_knows_the_noise_gets_the_image_back(sampler):
    """If eps is always the true noise, every sampler must end close to the latents, whatever its step sizes."""
    table = make_table(sampler, SCHEDULE, 20)
    random = np.random.default_rng(0)
    image, noise = random.standard_normal((2, 4, 4))
    start = np.sqrt(SCHEDULE.alphas_bar[int(table.timestep[0])])
    x = float(table.initial_scale) * (start * image + np.sqrt(1 - start**2) * noise)
    history = np.zeros((3, 4, 4))
    for row in range(len(table.timestep)):
        model = table.from_x[row] * x + table.from_eps[row] * noise
        seen = np.concatenate([model[None], history])
        x = table.x_coef[row] * x + np.einsum("k,khw->hw", table.history_coef[row], seen)
        history = seen[:-1] if table.remember[row] else history
    final = SCHEDULE.alphas_bar[0] if sampler in ("pndm", "ddim") else 1.0
    expected = np.sqrt(final) * image + np.sqrt(1 - final) * noise
    np.testing.assert_allclose(x, expected, atol=2e-5)


@pytest.mark.slow
def test_guidance_and_seed_compile_nothing():
    params = unet.init(CONFIG, jax.random.key(0))
    table = make_table("euler", SCHEDULE, 3)
    condition, unconditional = jax.random.normal(jax.random.key(1), (2, 2, 4, 8))
    before = samplers.sample._cache_size()
    images = [
        sample(
            params,
            table,
            jax.random.normal(jax.random.key(seed), (2, 4, 4, 4)),
            condition,
            unconditional,
            g,
            config=CONFIG,
        )
        for seed, g in ((0, 1.0), (1, 7.5), (2, 3.0))
    ]
    assert samplers.sample._cache_size() == before + 1, "one compilation for three guidances and seeds"
    assert all(bool(jnp.isfinite(p).all()) for p in images)
    assert not np.allclose(images[0], images[1])


@pytest.mark.slow
def test_a_batch_keeps_no_copy_of_its_inputs_a_step():
    """Sampling 8 takes no more than the U-Net on 16 needs, weights aside, and two sets of latents and history."""
    params = unet.init(CONFIG, jax.random.key(0))
    latents, condition = jnp.zeros((8, 8, 8, 4)), jnp.zeros((8, 4, 8))

    def memory(steps: int) -> int:
        arguments = (params, make_table("pndm", SCHEDULE, steps), latents, condition, condition, 7.5)
        return sample.lower(*arguments, config=CONFIG).compile().memory_analysis().temp_size_in_bytes

    once = jax.jit(lambda p, x, t, c: unet.apply(p, x, t, c, config=CONFIG))
    both = (params, jnp.zeros((16, 8, 8, 4)), jnp.zeros(16), jnp.zeros((16, 4, 8)))
    single = once.lower(*both).compile().memory_analysis().temp_size_in_bytes
    state = 12 * latents.nbytes + 4 * condition.nbytes
    assert memory(50) < memory(10) + 16 * 1024, f"{memory(50)} bytes for 50 steps, {memory(10)} for 10"
    assert memory(50) <= single + state, f"{memory(50)} bytes, expected at most {single} + {state}"


@pytest.mark.parametrize(
    ("sampler", "steps", "message"),
    [
        ("plms", 50, "sampler='plms' is unknown; did you mean"),
        ("pndm", 0, "steps=0; expected 1 to 999"),
        ("dpmpp", 10**9, "steps=1000000000; expected 1 to 999"),
    ],
)
def test_refused_before_anything_is_compiled(sampler, steps, message):
    with pytest.raises(UserError, match=message):
        make_table(sampler, SCHEDULE, steps)


def test_added_noise_keeps_the_variance():
    timesteps = jnp.array([0, 500, 999])
    latents, noise = jax.random.normal(jax.random.key(0), (2, 3, 64, 64, 4))
    noisy = add_noise(SCHEDULE, latents, noise, timesteps)
    np.testing.assert_allclose(noisy.std((1, 2, 3)), [1.0, 1.0, 1.0], atol=0.03)


def test_min_snr_counts_easy_timesteps_less():
    weights = loss_weights(SCHEDULE, jnp.array([0, 999]), 5.0)
    assert weights[0] < 0.01 and weights[1] == 1.0, weights
    np.testing.assert_array_equal(loss_weights(SCHEDULE, jnp.array([0, 999]), 0.0), [1.0, 1.0])
