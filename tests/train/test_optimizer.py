"""Schedule, decay mask, and settings that cannot work."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import models, quickstart
from emu_jax.errors import UserError
from emu_jax.models import emu
from emu_jax.train.optimizer import OptimizerConfig, apply_updates, make_optimizer, schedule


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
    shapes = emu.abstract(emu.EmuConfig.from_dict(models.debug()))
    params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), shapes)
    settings = config(weight_decay=1.0)
    optimizer = make_optimizer(settings)
    zeros = jax.tree.map(jnp.zeros_like, params)
    directions = jax.jit(lambda: optimizer.update(zeros, optimizer.init(params), params)[0])()
    decayed = {name for name, leaf in _flat(directions).items() if bool((leaf != 0).any())}
    assert {name.rsplit("/", 1)[-1] for name in decayed} == {"kernel"}
    assert len(decayed) == sum(name.endswith("/kernel") for name in _flat(params))


def _flat(tree, prefix=""):
    flat = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}{name}/") if isinstance(value, dict) else {prefix + name: value}
    return flat


def test_each_part_has_its_own_rate():
    ones = {part: {"x": jnp.ones(())} for part in ("vision", "ln_visual", "causal", "llama")}
    moved = apply_updates(ones, ones, {"vision": 0.5, "causal": 0.25, "llama": 0.0})
    assert {part: float(tree["x"]) for part, tree in moved.items()} == {
        "vision": 0.5,
        "ln_visual": 0.5,
        "causal": 0.75,
        "llama": 1.0,
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": {"head": 1.0}}, r"config\.optimizer\.learning_rate has \['head'\]; expected some of causal"),
        ({"drops": ((0.5, 0.1), (0.2, 0.5))}, r"config\.optimizer\.drops=.*; expected rising fractions"),
        ({"ema_decay": 1.0}, r"config\.optimizer\.ema_decay=1\.0; expected 0 to below 1"),
        ({"warmup_fraction": 1.0}, r"config\.optimizer\.warmup_fraction=1\.0; expected 0 to below 1"),
        ({"accumulate_steps": 0}, r"config\.optimizer\.accumulate_steps=0; expected 1 or more"),
        ({"b2": 1.0}, r"config\.optimizer\.b2=1\.0; expected 0 to below 1"),
        ({"beta": 0.9}, r"config\.optimizer\.beta is no field of OptimizerConfig; did you mean"),
    ],
)
def test_wrong_settings_fail_at_construction(changes, message):
    with pytest.raises(UserError, match=message):
        config(**changes)


def test_every_part_that_learns_has_a_rate():
    parts = {"vision": {}, "ln_visual": {}, "causal": {}, "llama": {}}
    rates = {"vision": 0.0, "causal": 1e-3, "llama": 1e-3}
    settings = config(learning_rate=rates)
    assert settings.frozen == {"vision"}
    settings.check_parts(parts)
    settings.check_parts({"causal": {}, "llama": {}})
    message = r"config\.optimizer\.learning_rate has \['causal', 'llama', 'vision'\]; this objective trains llama"
    with pytest.raises(UserError, match=message):
        settings.check_parts({"llama": {}})
    with pytest.raises(UserError, match=r"learning_rate has \['llama'\]; this objective trains causal, llama"):
        config(learning_rate={"llama": 1e-3}).check_parts({"causal": {}, "llama": {}})
    with pytest.raises(UserError, match=r"config\.optimizer\.learning_rate is 0 for every part; nothing would learn"):
        config(learning_rate=dict.fromkeys(rates, 0.0)).check_parts({})
