"""Replicas of the parameters reduce their gradients once a step, whatever the number of micro-batches."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emu_jax.models import emu
from emu_jax.models.paths import flatten
from emu_jax.plan.program import collectives
from emu_jax.sharding import make_mesh
from emu_jax.train.global_batch import batch_shardings
from emu_jax.train.optimizer import OptimizerConfig
from emu_jax.train.state import create_state
from emu_jax.train.step import compile_step
from tests.train import tiny
from tests.train.tasks import interleaved
from tests.train.test_step import DOCUMENTS, IDS, ROW_TOKENS, batch_of, model

ROOT = Path(__file__).parents[2]
COUNT, ROWS = 4, 32
MESHES = {"one device": {}, "replicas": {"slice": 2, "data": 2, "fsdp": 2}}
LANES = 128  # positions of a row that the kernel takes


def measured(attention: str) -> None:
    """Prints, for one device and for four replicas of two devices each: metrics, sums of parameters, bytes sent."""
    fields = tiny.get_config().optimizer
    fields.accumulate_steps = COUNT
    config = OptimizerConfig.from_dict(fields)
    sizes = model()
    task = interleaved(
        dataclasses.replace(sizes, llama=dataclasses.replace(sizes.llama, attention=attention)), IDS, config
    )
    names = [*DOCUMENTS]
    rows = [batch_of(DOCUMENTS[names[n % len(names)]], rows=1) for n in range(ROWS)]
    batch = jax.tree.map(lambda *leaves: np.concatenate(leaves), *rows)
    padding = ((0, 0), (0, LANES - ROW_TOKENS))
    padded = {name: np.pad(getattr(batch, name), padding) for name in ("segments", "text_weights", "visual_weights")}
    padded |= {"tokens": np.pad(batch.tokens, padding, constant_values=IDS.pad)}
    padded |= {"slots": np.pad(batch.slots, padding, constant_values=-1)}
    batch = dataclasses.replace(batch, **padded)
    for name, axes in MESHES.items():
        mesh = make_mesh(axes, jax.devices()[: 8 if axes else 1])
        with jax.set_mesh(mesh):
            state = create_state(task, config, 0, mesh)
            state.total_steps = jnp.asarray(10, device=state.total_steps.sharding)
            placed = jax.device_put(batch, batch_shardings(mesh, batch))
            step = compile_step(task, config, 0, state, placed)
            sent = [collectives(executable.as_text(), mesh) for executable in step.executables]
            for _ in range(3):
                state, metrics = step(state, placed)
        sums = {path: float(jnp.abs(leaf).sum()) for path, leaf in flatten(state.params).items()}
        found = {metric: float(value) for metric, value in metrics.items()}
        print(json.dumps({"name": name, "sent": sent, "metrics": found, "parameters": sums}))


@pytest.mark.long
@pytest.mark.parametrize("attention", ["plain", "splash"])
def test_replicas_reduce_their_gradients_once_a_step(attention):
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    code = f"from tests.train.test_replicas import measured; measured({attention!r})"
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
    parameters = 4.0 * sum(leaf.size for leaf in jax.tree.leaves(emu.abstract(model())))
    print(f"bytes that cross between replicas: {crossing}; parameters {parameters:.0f}")
    adding, updating = (sum(kinds.values()) for kinds in crossing)
    assert adding < 0.01 * parameters, "metrics alone cross in a micro-batch"
    # Each of two devices reduces its half of the gradients over four replicas, by a ring: 2 x 3/4 of it.
    assert updating == pytest.approx(1.5 * parameters / 2, rel=0.1)
