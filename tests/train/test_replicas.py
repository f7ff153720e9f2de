"""Replicas of the parameters reduce their gradients once a step, whatever the number of micro-batches."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emu_jax.models.paths import flatten
from emu_jax.plan.program import collectives
from emu_jax.sharding import make_mesh
from emu_jax.train.global_batch import batch_shardings
from emu_jax.train.optimizer import OptimizerConfig
from emu_jax.train.state import create_state
from emu_jax.train.step import compile_step
from tests.train import tiny
from tests.train.tasks import interleaved

ROOT = Path(__file__).parents[2]
COUNT, ROWS = 4, 32
MESHES = {"one device": {}, "replicas": {"slice": 2, "data": 2, "fsdp": 2}}


def measured() -> None:
    """Prints, for one device and for four replicas of two devices each: metrics, digests of parameters, bytes sent."""
    from tests.train.test_step import DOCUMENTS, IDS, batch_of, model

    fields = tiny.get_config().optimizer
    fields.accumulate_steps = COUNT
    config = OptimizerConfig.from_dict(fields)
    task = interleaved(model(), IDS, config)
    names = [*DOCUMENTS]
    rows = [batch_of(DOCUMENTS[names[n % len(names)]], rows=1) for n in range(ROWS)]
    batch = jax.tree.map(lambda *leaves: np.concatenate(leaves), *rows)
    for name, sizes in MESHES.items():
        mesh = make_mesh(sizes, jax.devices()[: 8 if sizes else 1])
        with jax.set_mesh(mesh):
            state = create_state(task, config, 0, mesh)
            state.total_steps = jnp.asarray(10, device=state.total_steps.sharding)
            placed = jax.device_put(batch, batch_shardings(mesh, batch))
            step = compile_step(task, config, 0, state, placed)
            sent = [collectives(executable.as_text(), mesh) for executable in step.executables]
            for _ in range(3):
                state, metrics = step(state, placed)
        sums = {path: float(jnp.abs(leaf).sum()) for path, leaf in flatten(state.params).items()}
        found = {name: float(value) for name, value in metrics.items()}
        print(json.dumps({"name": name, "sent": sent, "metrics": found, "parameters": sums}))


@pytest.mark.long
def test_replicas_reduce_their_gradients_once_a_step():
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    code = "from tests.train.test_replicas import measured; measured()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    one, several = map(json.loads, done.stdout.splitlines())

    for name in ("loss", "text_loss", "regression_loss", "grad_norm", "param_norm/llama"):
        got, expected = several["metrics"][name], one["metrics"][name]
        print(f"{name}: {got:.7g}, on one device {expected:.7g}")
        assert got == pytest.approx(expected, rel=1e-5)
    assert several["parameters"] == pytest.approx(one["parameters"], rel=1e-4)

    crossing = [
        {kind: size for kind, size in sent.items() if {"slice", "data"} & set(kind.split(" ")[0].split("+"))}
        for sent in several["sent"]
    ]
    parameters = 4.0 * sum(leaf.size for leaf in jax.tree.leaves(_parameters()))
    print(f"bytes that cross between replicas: {crossing}; parameters {parameters:.0f}")
    adding, updating = (sum(kinds.values()) for kinds in crossing)
    assert adding < 0.01 * parameters, "metrics alone cross in a micro-batch"
    # Each of two devices reduces its half of the gradients over four replicas, by a ring: 2 x 3/4 of it.
    assert updating == pytest.approx(1.5 * parameters / 2, rel=0.1)


def _parameters() -> dict:
    from emu_jax.models import emu
    from tests.train.test_step import model

    return emu.abstract(model())
