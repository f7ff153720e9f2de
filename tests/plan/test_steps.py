"""Steps as they are planned: what a config freezes is frozen in the small steps too, whose layers are fewer."""

import jax
import pytest

from configs import models, pretrain
from emu_jax.plan import steps
from emu_jax.sharding import make_mesh


@pytest.fixture
def config():
    found = pretrain.get_config()
    found.model = models.debug()
    found.data.update({"batch_rows": 2, "row_images": 1, "row_tokens": 32})
    return found


@pytest.mark.parametrize(
    ("groups", "frozen"),
    [
        ((), set()),
        ((("vision/blocks/1/.*", 1.0, None, True),), set()),
        (
            ((r"(vision|llama)/blocks/.*norm.*/scale", 1.0, None, True), (".*norm.*", 0.5, None, False)),
            {f"{name}/scale" for name in ("vision/blocks/norm1", "vision/blocks/norm2")}
            | {f"llama/blocks/{name}_norm/scale" for name in ("attn", "mlp")},
        ),
        ((("llama/embed/embedding[-4:]", 1.0, None, False), ("llama/embed/.*", 1.0, None, True)), set()),
    ],
)
def test_groups_of_a_small_step(config, groups, frozen):
    config.optimizer.groups = groups
    mesh = make_mesh({}, jax.devices()[:1])
    task = steps.planned_task(config)
    small = task.shallow({"vision": 1, "causal": 1, "llama": 1})
    entries = small.config.optimizer.groups
    assert {pattern.replace("\\", "") for pattern, *_ in entries} == frozen
    assert all(rest == [1.0, None, True] for _, *rest in entries)
    whole, part = steps.training_step(task, mesh), steps.training_step(small, mesh)
    assert (whole.moving - part.moving) > 0, "two layers' gradients and one's"


@pytest.mark.long
def test_with_micro_batches_a_step_is_two_programs_beside_their_sums(config):
    mesh = make_mesh({}, jax.devices()[:1])
    config.optimizer.accumulate_steps = 2
    step = steps.training_step(steps.planned_task(config), mesh)
    with jax.set_mesh(mesh):
        assert [(program.name, program.times) for program in step.lower()] == [("add_micro_batch", 2), ("update", 1)]
    assert step.moving < step.held["gradient sums"] < 1.01 * step.moving, "gradients, and some numbers"
    config.optimizer.accumulate_steps = 1
    assert "gradient sums" not in steps.training_step(steps.planned_task(config), mesh).held


def test_an_ema_is_held_beside_the_parameters(config):
    mesh = make_mesh({}, jax.devices()[:1])
    config.optimizer.ema_decay = 0.999
    config.optimizer.groups = (("llama/.*", 1.0, None, True),)
    step = steps.training_step(steps.planned_task(config), mesh)
    held, parameters = step.held, step.moving  # of what is trained, float32 both
    print(held)
    assert held["EMA"] == parameters < held["parameters"]
    config.optimizer.ema_decay = 0.0
    assert "EMA" not in steps.training_step(steps.planned_task(config), mesh).held
