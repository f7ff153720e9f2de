"""Schedule, decay mask, and settings that cannot work."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import models, quickstart
from emu_jax.errors import UserError
from emu_jax.models import emu
from emu_jax.models.paths import flatten
from emu_jax.train.optimizer import OptimizerConfig, norms, schedule, updates


def config(**changes) -> OptimizerConfig:
    fields = quickstart.get_config().optimizer.to_dict()
    return OptimizerConfig.from_dict(fields | changes)


def test_schedule_warms_up_and_falls_to_the_final_fraction():
    settings = config(warmup_fraction=0.2, final_fraction=0.1)
    factors = [float(schedule(settings, jnp.asarray(step), jnp.asarray(10))) for step in range(10)]
    np.testing.assert_allclose(factors[:2], [0.5, 1.0], rtol=1e-6)
    assert factors[1:] == sorted(factors[1:], reverse=True)
    np.testing.assert_allclose(factors[5], 0.1 + 0.9 * 0.5, rtol=1e-5)  # halfway down
    np.testing.assert_allclose(factors[9], 0.1, rtol=1e-5)


def test_only_matrices_decay():
    """Where there is no gradient, what is subtracted is the decay."""
    fields = emu.EmuConfig.from_dict(models.debug())
    shapes = emu.abstract(fields)
    params = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 2.0, leaf.dtype), shapes)
    rates = {"vision": 1.0, "causal": 0.5, "llama": 0.25}
    settings = config(weight_decay=0.1, learning_rate=rates)
    found = settings.hyperparameters(emu.logical_axes(fields), shapes)
    zeros = jax.tree.map(jnp.zeros_like, params)
    changes = flatten(updates(zeros, params, jnp.asarray(0.5), found))
    kernels = {name for name in changes if name.endswith("/kernel")}
    assert {name for name, leaf in changes.items() if bool((leaf != 0).any())} == kernels
    for name in kernels:
        np.testing.assert_allclose(changes[name], 0.5 * rates[name.partition("/")[0]] * 0.1 * 2.0, rtol=1e-6)


def test_each_part_has_its_own_rate():
    shapes = {part: {"x": jax.ShapeDtypeStruct((), jnp.float32)} for part in ("vision", "ln_visual", "causal", "llama")}
    settings = config(weight_decay=0.0, learning_rate={"vision": 0.5, "causal": 0.25, "llama": 0.0})
    found = settings.hyperparameters({part: {"x": ()} for part in shapes}, shapes)
    ones = {part: {"x": jnp.ones(())} for part in shapes}
    moved = updates(ones, ones, jnp.asarray(0.5), found)
    assert {part: float(tree["x"]) for part, tree in moved.items()} == {
        "vision": 0.25,
        "ln_visual": 0.25,
        "causal": 0.125,
        "llama": 0.0,
    }


def test_norms_are_of_parts():
    trees = {
        "vision": {"a": jnp.asarray([3.0])},
        "ln_visual": {"b": jnp.asarray([4.0])},
        "llama": {"c": -jnp.ones((2, 2))},
    }
    assert {part: float(norm) for part, norm in norms(trees).items()} == {"vision": 5.0, "llama": 2.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": {}}, r"config\.optimizer\.learning_rate is empty; expected one for each part"),
        ({"drops": ((0.5, 0.1), (0.2, 0.5))}, r"config\.optimizer\.drops=.*; expected rising fractions"),
        ({"ema_decay": 1.0}, r"config\.optimizer\.ema_decay=1\.0; expected 0 to below 1"),
        ({"warmup_fraction": 1.0}, r"config\.optimizer\.warmup_fraction=1\.0; expected 0 to below 1"),
        ({"accumulate_steps": -1}, r"config\.optimizer\.accumulate_steps=-1; expected 1 or more, or 0"),
        ({"b2": 1.0}, r"config\.optimizer\.b2=1\.0; expected 0 to below 1"),
        ({"beta": 0.9}, r"config\.optimizer\.beta is no field of OptimizerConfig; did you mean"),
    ],
)
def test_wrong_settings_fail_at_construction(changes, message):
    with pytest.raises(UserError, match=message):
        config(**changes)


@pytest.mark.slow
def test_every_part_that_learns_has_a_rate():
    def check(settings: OptimizerConfig, *parts: str) -> None:
        settings.check({part: {"x": ()} for part in parts}, {part: {"x": jnp.ones(())} for part in parts})

    parts = ("vision", "ln_visual", "causal", "llama")
    rates = {"vision": 0.0, "causal": 1e-3, "llama": 1e-3}
    settings = config(learning_rate=rates)
    assert settings.frozen == {"vision"}
    check(settings, *parts)
    check(settings, "causal", "llama")
    message = r"config\.optimizer\.learning_rate has \['causal', 'llama', 'vision'\]; this objective trains llama"
    with pytest.raises(UserError, match=message):
        check(settings, "llama")
    with pytest.raises(UserError, match=r"learning_rate has \['llama'\]; this objective trains causal, llama"):
        check(config(learning_rate={"llama": 1e-3}), "causal", "llama")
    with pytest.raises(
        UserError, match=r"config\.optimizer\.learning_rate has \['head'\]; this objective trains llama"
    ):
        check(config(learning_rate={"head": 1.0}), "llama")
    with pytest.raises(UserError, match=r"config\.optimizer\.learning_rate is 0 for every part; nothing would learn"):
        check(config(learning_rate=dict.fromkeys(rates, 0.0)), *parts)
