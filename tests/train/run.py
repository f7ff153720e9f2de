"""What the tests of this folder run as a process: `python -m tests.train.run WORKDIR …` from the project root.

    --signal-at N     sends itself SIGKILL, or --signal NAME, when it asks for the data of step N + 1, or sleeps then
                      (--signal sleep); of several processes (emu_jax/train/distributed.py) --process I does so
    --restore FOLDER  restores this other run's newest checkpoint onto the mesh of WORKDIR's config, after training
    --file FILE       another config than tests/train/tiny.py
    --config.a.b=c    overrides of it

Prints one line of JSON: devices, bytes of parameters, of second moments and of the EMA, in all and on the first device,
digests of restored parameters.
"""

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path

import jax
from ml_collections import ConfigDict

from emu_jax.checkpoints.digests import digests
from emu_jax.config import load_config
from emu_jax.data.pipeline import Stream
from emu_jax.errors import CommandError
from emu_jax.sharding import make_mesh
from emu_jax.storage import as_path
from emu_jax.train import distributed, loop
from emu_jax.train.checkpoint import Checkpoints, Rotation
from emu_jax.train.optimizer import OptimizerConfig
from emu_jax.train.state import abstract_state
from emu_jax.train.tasks.task import make_task


def signal_at(step: int, name: str, process: int) -> None:
    """Replaces the reader of batches by one that sends a signal to this process, if it is the one."""

    class Interval(loop.Interval):
        _steps = 0

        def next_batch(self, batches: Stream) -> dict:
            if self._steps == step and jax.process_index() == process:
                time.sleep(3600) if name == "sleep" else os.kill(os.getpid(), signal.Signals[name])
            self._steps += 1
            return super().next_batch(batches)

    loop.Interval = Interval


def describe(params: dict) -> dict:
    """Bytes of a tree of parameters, in all and on its first device."""
    leaves = jax.tree.leaves(params)
    return {
        "devices": jax.device_count(),
        "bytes": sum(leaf.nbytes for leaf in leaves),
        "bytes_on_first_device": sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves),
    }


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("workdir", type=as_path)
    parser.add_argument("--signal-at", type=int)
    parser.add_argument("--signal", default="SIGKILL")
    parser.add_argument("--process", type=int, default=0)
    parser.add_argument("--restore", type=as_path)
    parser.add_argument("--file", default=str(Path(__file__).with_name("tiny.py")))
    options, overrides = parser.parse_known_args()
    config = load_config(options.file, overrides)
    if options.signal_at:
        signal_at(options.signal_at, options.signal, options.process)
    try:
        with distributed.job():
            print(json.dumps(train(config, options)))
    except CommandError as stopped:
        print(stopped, file=sys.stderr)
        return stopped.exit_code
    return 0


def train(config: ConfigDict, options: argparse.Namespace) -> dict:
    state = loop.train(config, options.workdir)
    result = {"trained": describe(state.params), "moments": describe(state.opt_state[1].nu)}
    if "ema" in state.statistics:
        result["ema"] = describe(state.statistics["ema"])
    if options.restore:
        mesh = make_mesh(config.train.mesh)
        task, inputs = make_task(config, mesh)
        target = abstract_state(task, OptimizerConfig.from_dict(config.optimizer), mesh)
        with Checkpoints(options.restore, Rotation(2), timeout=600) as checkpoints, jax.set_mesh(mesh):
            restored = checkpoints.restore(target, inputs.tokenizer).state
        result["restored"] = describe(restored.params) | {"digests": digests({"params": restored.params})}
    return result


if __name__ == "__main__":
    sys.exit(main())
