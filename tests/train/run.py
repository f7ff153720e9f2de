"""What the tests of this folder run as a process: `python -m tests.train.run WORKDIR …` from the project root.

    --die-at N        kills itself by SIGKILL right after step N has been dispatched
    --restore FOLDER  restores this other run's newest checkpoint onto the mesh of WORKDIR's config, after training
    --config.a.b=c    overrides of tests/train/tiny.py

Prints one line of JSON: devices, bytes of parameters in all and on the first device, digests of the final state.
"""

import argparse
import json
import os
import signal
import sys
from pathlib import Path

import jax

from emu_jax.config import load_config
from emu_jax.train import loop
from emu_jax.train.checkpoint import Checkpoints
from emu_jax.train.experiment import make_experiment
from emu_jax.train.mesh import make_mesh
from emu_jax.train.optimizer import OptimizerConfig
from emu_jax.train.state import abstract_state


def die_at(step: int) -> None:
    """Replaces the progress bar's count by one that ends the process."""

    class Writer(loop.MetricsWriter):
        def __init__(self, workdir: Path, *, start: int, total: int):
            super().__init__(workdir, start=start, total=total)
            self._step = start

        def advance(self) -> None:
            self._step += 1
            if self._step == step:
                os.kill(os.getpid(), signal.SIGKILL)

    loop.MetricsWriter = Writer


def describe(params: dict) -> dict:
    """Bytes of a tree of parameters, in all and on its first device."""
    leaves = jax.tree.leaves(params)
    return {
        "devices": jax.device_count(),
        "bytes": sum(leaf.nbytes for leaf in leaves),
        "bytes_on_first_device": sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--die-at", type=int)
    parser.add_argument("--restore", type=Path)
    options, overrides = parser.parse_known_args()
    config = load_config(str(Path(__file__).with_name("tiny.py")), overrides)
    if options.die_at:
        die_at(options.die_at)
    state = loop.train(config, options.workdir)
    result = {"trained": describe(state.params)}
    if options.restore:
        experiment = make_experiment(config)
        mesh = make_mesh(config.train.mesh)
        target = abstract_state(experiment.objective, OptimizerConfig.from_dict(config.optimizer), mesh)
        with Checkpoints(options.restore, keep=2) as checkpoints, jax.set_mesh(mesh):
            restored, _ = checkpoints.restore(target, experiment.tokenizer)
        result["restored"] = describe(restored.params)
    print(json.dumps(result))


if __name__ == "__main__":
    sys.exit(main())
