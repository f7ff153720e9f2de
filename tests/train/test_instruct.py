"""Adapters: they alone are trained, and they add to the language model what merging them would."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import instruct
from emu_jax.errors import UserError
from emu_jax.models import emu, lora
from emu_jax.models.paths import flatten, nest
from emu_jax.train import objective
from emu_jax.train.optimizer import OptimizerConfig
from tests.train import tiny
from tests.train.test_step import DOCUMENTS, IDS, batch_of, model


def adapted() -> emu.EmuConfig:
    fields = model().to_dict()
    fields["llama"] |= {"lora_rank": 3, "lora_alpha": 6.0}
    return emu.EmuConfig.from_dict(fields | {"regression_loss_weight": 0.0})


@pytest.fixture(scope="module")
def trained() -> tuple:
    """A state before and after two steps on one document."""
    from emu_jax.train.mesh import make_mesh
    from emu_jax.train.state import create_state
    from emu_jax.train.step import make_train_step

    fields = tiny.get_config().optimizer
    fields.learning_rate = {"llama": 1e-2}
    config = OptimizerConfig.from_dict(fields)
    goal = objective.instruct(adapted(), IDS)
    config.check_parts(goal.split(goal.logical_axes)[0])
    before = create_state(goal, config, 0, make_mesh({}, jax.devices()[:1]))
    step = jax.jit(make_train_step(goal, config, 0))
    after = before
    losses = []
    for _ in range(2):
        after, metrics = step(after, batch_of(DOCUMENTS["image first"]))
        losses.append(float(metrics["loss"]))
    return before, after, losses


def test_adapters_alone_are_trained(trained):
    before, after, losses = trained
    assert losses[1] < losses[0]
    old, new = flatten(before.params), flatten(after.params)
    moved = {path for path in old if not np.array_equal(old[path], new[path])}
    expected = {f"llama/blocks/attn/{name}/{half}" for name in "qkvo" for half in "ab"}
    assert moved == expected, f"expected {sorted(expected)}"
    sizes = {path: leaf.shape for path, leaf in flatten(after.opt_state[1].mu).items()}
    assert set(sizes) == expected, "moments of what is trained alone"


def test_adapters_equal_merged_weights(trained):
    _, after, _ = trained
    flat = flatten(after.params)
    adapters = {path: leaf for path, leaf in flat.items() if lora.is_adapter(path)}
    plain = {path: leaf for path, leaf in flat.items() if path not in adapters}
    merged = lora.merge(nest(plain), nest(adapters), alpha=6.0)
    batch = batch_of(DOCUMENTS["image first"])
    statistics = emu.initial_statistics(model())
    beside = emu.intermediates(after.params, statistics, batch, config=adapted(), ids=IDS)["logits"]
    inside = emu.intermediates(merged, statistics, batch, config=model(), ids=IDS)["logits"]
    np.testing.assert_allclose(beside, inside, atol=1e-5)
    assert (
        float(
            jnp.abs(beside - emu.intermediates(nest(plain), statistics, batch, config=model(), ids=IDS)["logits"]).max()
        )
        > 1e-3
    )


def test_without_adapters_there_is_nothing_to_train():
    with pytest.raises(UserError, match=r"config\.model\.llama\.lora_rank=0; the objective instruct trains adapters"):
        objective.instruct(model(), IDS)


def test_the_config_trains_what_the_objective_does():
    config = instruct.get_config()
    config.model.llama.vocab_size = 32_004
    goal = objective.instruct(emu.EmuConfig.from_dict(config.model), IDS)
    OptimizerConfig.from_dict(config.optimizer).check_parts(goal.split(goal.logical_axes)[0])
