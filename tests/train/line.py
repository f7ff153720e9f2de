"""A line through points: a task of two parts that compiles in a moment, for tests of the step and the loop.

`config.bad` are the indices of points whose height is infinite.
"""

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from configs import vae
from emu_jax.data.examples import ExamplePipeline, ExamplesConfig
from emu_jax.train.optimizer import OptimizerConfig
from emu_jax.train.tasks.task import Inputs, Task, trainable_paths

POINTS, ROWS, STEPS = 64, 8, 16


class Points:
    """Points on y = 3 x + 1."""

    def __init__(self, bad: tuple[int, ...] = ()):
        self._bad, self.fingerprint = bad, f"points {bad}"

    def __len__(self) -> int:
        return POINTS

    def key(self, index: int) -> str:
        return f"point-{index}"

    def example(self, index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        x = np.float32(index / POINTS)
        return {"x": x, "y": np.float32(np.inf) if index in self._bad else 3 * x + 1}


class Line(Task):
    holds = "line"
    plots: ClassVar = {"losses": ("loss",)}
    row_name = "points"
    summed = frozenset({"loss"})

    def __init__(self, config: ConfigDict, inputs: Inputs | None = None):
        self.config, self.rows = config, config.data.batch
        self.logical_axes = {"slope": {"kernel": (None,)}, "offset": {"bias": (None,)}}
        self.shapes = jax.eval_shape(lambda: self.init(jax.random.key(0))[0])
        self.trainable = trainable_paths(self.logical_axes, self.shapes, OptimizerConfig.from_dict(config.optimizer))

    @classmethod
    def open(cls, config, own):
        data = ExamplesConfig.from_dict(config.data)
        stream = ExamplePipeline(Points(config.bad), data, own=own(data.batch))
        return Inputs(config.copy_and_resolve_references(), stream)

    def init(self, key):
        return {"slope": {"kernel": jnp.full(1, 0.5)}, "offset": {"bias": jnp.zeros(1)}}, {"height": jnp.zeros(())}

    def normalisers(self, batch):
        return jnp.asarray(float(len(batch["x"])))

    def loss(self, params, statistics, batch, key, count):
        error = params["slope"]["kernel"] * batch["x"] + params["offset"]["bias"] - batch["y"]
        loss = jnp.square(error).sum() / count
        return loss, ({"loss": loss}, {"height": 0.9 * statistics["height"] + 0.1 * batch["y"].mean()})


def get_config() -> ConfigDict:
    config = vae.get_config()
    for name in ("vae", "image_size", "loss"):
        del config[name]
    config.objective, config.bad = "tests.train.line:Line", ()
    config.data.update({"source": "points", "batch": ROWS})
    config.optimizer.learning_rate = ConfigDict({"slope": 0.1, "offset": 0.1})
    config.optimizer.ema_decay = 0.9
    config.train.update({"steps": STEPS, "minutes": 0.0, "log_every": 1, "checkpoint_every": 4, "max_bad_steps": 3})
    return config
