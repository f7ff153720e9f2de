"""The speed benchmark's PyTorch baseline computes what we compute: same loss, same gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import models
from emu_jax.models import emu

torch = pytest.importorskip("torch", reason="the baseline is PyTorch; install .[convert]")

from tests.benchmarks.benchmark_speed import synthetic_batch, torch_batch  # noqa: E402
from tests.benchmarks.torch_emu import TorchEmu, torch_state  # noqa: E402

IDS = emu.SpecialIds(pad=64, img=65, img_end=66, image=67)


@pytest.mark.parametrize("from_scratch", [False, True])
@pytest.mark.slow
def test_loss_and_gradients_agree(from_scratch):
    config = emu.EmuConfig.from_dict(models.debug())
    config = dataclasses.replace(config, standardise=from_scratch, stop_target_inputs=from_scratch)
    params = emu.init(config, jax.random.key(0))
    batch = synthetic_batch(config, IDS, rows=2, row_tokens=40, row_images=2)
    objective = jax.jit(jax.value_and_grad(emu.loss, has_aux=True), static_argnames=("config", "ids"))
    statistics = emu.initial_statistics(config)
    (loss, _), gradients = objective(params, statistics, jax.tree.map(jnp.asarray, batch), config=config, ids=IDS)

    model = TorchEmu(config, IDS)
    model.load_state_dict(torch_state(params, config))
    torch_loss = model(*torch_batch(batch))
    torch_loss.backward()

    np.testing.assert_allclose(torch_loss.item(), loss, rtol=1e-4)
    expected = torch_state(gradients, config)
    for name, parameter in model.named_parameters():
        limit = 1e-4 * max(expected[name].abs().max().item(), 1e-3)
        np.testing.assert_allclose(parameter.grad, expected[name], atol=limit, rtol=0, err_msg=name)
