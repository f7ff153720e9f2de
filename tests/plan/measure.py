"""Measures what a plan predicts, on the devices at hand: `python -m tests.plan.measure CONFIG --config.a.b=c …`.

Prints one line of JSON: bytes predicted and measured, and counted over analytic FLOPs. A process of its own, for the
peak of a process's memory is what is measured.
"""

import ctypes
import gc
import json
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp

from emu_jax.config import load_config
from emu_jax.plan.plan import make_plan
from emu_jax.plan.steps import planned_task, training_step
from emu_jax.plan.topology import describe
from emu_jax.sharding import make_mesh
from emu_jax.train.optimizer import OptimizerConfig
from emu_jax.train.state import abstract_state, create_state
from emu_jax.train.step import compile_step

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def resident(name: str) -> int:
    """Bytes, VmRSS now or VmHWM at most since `forget_peak`."""
    return 1024 * int(re.search(rf"{name}:\s+(\d+) kB", STATUS.read_text())[1])


def settle() -> None:
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    CLEAR.write_text("5")  # the peak begins anew


def main() -> None:
    config = load_config(sys.argv[1], sys.argv[2:])
    plan = make_plan(config, describe("here"))
    mesh = make_mesh(config.train.mesh)
    task = planned_task(config)
    step = training_step(task, mesh)
    optimizer = OptimizerConfig.from_dict(config.optimizer)
    with jax.set_mesh(mesh):
        executable = compile_step(task, optimizer, config.train.seed, abstract_state(task, optimizer, mesh), step.batch)
        batch = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), step.batch)
        state = jax.block_until_ready(create_state(task, optimizer, 0, mesh))
        held = sum(x.nbytes for x in jax.tree.leaves((state, batch)))
        state, metrics = jax.block_until_ready(executable(state, batch))  # threads and their stacks come once
        settle()
        before = resident("VmRSS")
        for _ in range(3):
            state, metrics = executable(state, batch)
            jax.block_until_ready(metrics)
        measured = held + resident("VmHWM") - before
    print(json.dumps({"predicted": plan.peak, "measured": measured, "agreement": plan.agreement}))


if __name__ == "__main__":
    main()
