"""How fast the project runs on the devices at hand: input, decoding, drawing, training; with random weights.

In: an experiment's config. Out: `Timing`s. Decoding and drawing run on one device, training on the config's mesh over
the devices of this one process.

    input          batches from the config's own pipeline, from its first on: images are decoded as they come
    decode         text from embedded prompts with a KV cache, greedily, </s> forbidden
    draw           guided PNDM steps of the U-Net, without the VAE
    train step     what the loop runs: `compile_step`, its state donated, on a batch of the pipeline
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from emu_jax.config import load_config
from emu_jax.errors import UserError
from emu_jax.generate import text
from emu_jax.generate.samplers import make_table, sample
from emu_jax.models import emu, unet
from emu_jax.models.diffusion import Schedule
from emu_jax.models.flops import forward_flops, unet_forward_flops
from emu_jax.plan.topology import peak_flops
from emu_jax.sharding import make_mesh
from emu_jax.train.experiment import Experiment, make_experiment
from emu_jax.train.global_batch import batch_shardings
from emu_jax.train.metrics import COUNTED
from emu_jax.train.optimizer import OptimizerConfig
from emu_jax.train.state import create_state
from emu_jax.train.step import compile_step

# The U-Net's config, and the latents' size: images of 64 and 512 pixels.
DRAWINGS = {"quickstart": ("configs/decoder.py", 8), "sd15": ("configs/decoder.py:published", 64)}
LATENT_CHANNELS, STEPS, GUIDANCE = 4, 50, 7.5
BATCHES = (1, 8)  # prompts decoded, images drawn at a time
TOKENS = 64  # of a prompt, and again of its continuation, unless the model's context is shorter
INPUT_BATCHES = 16  # timed together: the pipeline reads ahead
SECONDS = 0.2  # a repetition takes at least: short calls are run several times, without waiting in between


@dataclasses.dataclass(frozen=True)
class Timing:
    """One thing that was timed.

    Attributes:
      seconds: of one call, a repetition each.
      units: what a call gets done, as in {"tokens": 64.0}.
      flops: of a call, over all devices; 0 where they are not counted. devices: that worked on it.
      peak_flops: of a device; 0 where it is not known.
      memory: bytes, the most that any device has held since the process began; 0 where devices do not tell.
    """

    name: str
    shape: str
    seconds: tuple[float, ...]
    units: dict[str, float]
    flops: float = 0.0
    devices: int = 1
    peak_flops: float = 0.0
    memory: float = 0.0

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def rates(self) -> dict[str, float]:
        """Units a second."""
        return {unit: count / self.median for unit, count in self.units.items()}

    @property
    def flops_per_s(self) -> float:
        return self.flops / self.median

    @property
    def mfu(self) -> float:
        """Counted FLOPs over what the devices could do in that time in bfloat16; 0 where that is not known."""
        return self.flops_per_s / (self.devices * self.peak_flops) if self.peak_flops else 0.0

    def to_json(self) -> dict[str, Any]:
        derived = {"median": self.median, "rates": self.rates, "flops_per_s": self.flops_per_s, "mfu": self.mfu}
        return dataclasses.asdict(self) | derived


def bench(config: ConfigDict, *, size: str = "quickstart", repetitions: int = 5) -> list[Timing]:
    """Times everything that a config can run; decoding and drawing belong to pretraining alone.

    Args:
      size: of the U-Net that draws, one of `DRAWINGS`; its condition is the config's model's.

    Raises:
      UserError: a setting cannot work.
    """
    if repetitions < 1:
        raise UserError(f"--repetitions {repetitions}; expected at least 1")
    if size not in DRAWINGS:
        raise UserError(f"--size {size} is unknown; choose one of {', '.join(DRAWINGS)}")
    spec, latent = DRAWINGS[size]
    drawing = load_config(spec)
    experiment = make_experiment(config)
    try:
        # Training comes last, for it needs the most memory.
        found = [_input(experiment, repetitions)]
        if config.objective == "pretrain":
            model = emu.EmuConfig.from_dict(config.model)
            params = emu.init(model, jax.random.key(0))
            found += [_decode(model, params, rows, repetitions) for rows in BATCHES]
            del params
            found += _draw(drawing, latent, model, repetitions)
        return [*found, _train(config, experiment, repetitions)]
    finally:
        experiment.stream.close()


def timed(run: Callable[[], Any], repetitions: int) -> tuple[float, ...]:
    """Seconds of a call, a repetition each, after two that compile and fault pages in."""
    jax.block_until_ready(run())
    started = time.perf_counter()
    jax.block_until_ready(run())
    calls = math.ceil(SECONDS / (time.perf_counter() - started))
    seconds = []
    for _ in range(repetitions):
        started = time.perf_counter()
        for _ in range(calls):
            result = run()
        jax.block_until_ready(result)
        seconds.append((time.perf_counter() - started) / calls)
    return tuple(seconds)


def _input(experiment: Experiment, repetitions: int) -> Timing:
    """What each unit of a batch is, is counted over all batches seen: rows are packed to different degrees."""
    counts, seconds = [], []
    for number in range(repetitions + 1):
        started = time.perf_counter()
        batches = [(next(experiment.stream), experiment.stream.describe()) for _ in range(INPUT_BATCHES)]
        if number:  # the first one starts threads or processes
            seconds.append((time.perf_counter() - started) / INPUT_BATCHES)
        counts += [count for _, count in batches]
    units = {name: float(np.mean([count[name] for count in counts])) for name in COUNTED if name in counts[0]}
    rows = len(jax.tree.leaves(batches[0][0])[0])
    return Timing("input", f"{rows} rows", tuple(seconds), {"rows": float(rows)} | units)


def _decode(config: emu.EmuConfig, params: emu.Params, rows: int, repetitions: int) -> Timing:
    tokens = min(TOKENS, config.llama.context // 4)
    inputs = jax.random.normal(jax.random.key(1), (rows, tokens, config.llama.width))
    valid = jnp.ones((rows, tokens), bool)
    static = {"config": config, "ends": (0,), "max_new_tokens": tokens}
    decoding = text.Decoding(min_length=tokens + 2)  # never </s>: every row writes all its tokens

    def run() -> Any:
        return text.generate(params, inputs, valid, jax.random.key(0), decoding, **static)

    # The LLM over prompt and continuation, and the token head over the continuation alone.
    forward = forward_flops(config, 0, rows, 2 * tokens)
    flops = forward["llama"] + forward["adapters"] + forward["attention"]
    flops += 2.0 * rows * tokens * config.llama.width * config.llama.vocab_size
    shape = f"{rows} x {tokens} tokens after {tokens}"
    units = {"tokens": float(rows * tokens)}
    return _measured("decode", shape, timed(run, repetitions), units, flops, jax.devices()[:1])


def _draw(drawing: ConfigDict, latent: int, model: emu.EmuConfig, repetitions: int) -> list[Timing]:
    drawing.unet.update({"latent_channels": LATENT_CHANNELS, "condition_dim": model.llama.width})
    config = unet.UNetConfig.from_dict(drawing.unet)
    params = unet.init(config, jax.random.key(0))
    table = make_table("pndm", Schedule.from_dict(drawing.schedule), STEPS)
    found = []
    for images in BATCHES:
        noise = jax.random.normal(jax.random.key(1), (images, latent, latent, LATENT_CHANNELS))
        shape = (2, images, model.causal.queries, model.llama.width)
        condition, unconditional = jax.random.normal(jax.random.key(2), shape)

        def run(noise: jax.Array = noise, condition: jax.Array = condition, other: jax.Array = unconditional) -> Any:
            return sample(params, table, noise, condition, other, GUIDANCE, config=config)

        calls = len(table.timestep)  # each of both halves, with and without the condition
        flops = calls * sum(unet_forward_flops(config, 2 * images, latent, model.causal.queries).values())
        what = f"{images} of {latent} x {latent}, {STEPS} steps"
        units = {"images": float(images)}
        found.append(_measured("draw", what, timed(run, repetitions), units, flops, jax.devices()[:1]))
    return found


def _train(config: ConfigDict, experiment: Experiment, repetitions: int) -> Timing:
    objective, optimizer = experiment.objective, OptimizerConfig.from_dict(config.optimizer)
    mesh = make_mesh(config.train.mesh)
    arrays = next(experiment.stream)
    counts = experiment.stream.describe()
    with jax.set_mesh(mesh):
        state = create_state(objective, optimizer, config.train.seed, mesh)
        batch = objective.batch(**jax.device_put(arrays, batch_shardings(mesh, arrays)))
        step = compile_step(objective, optimizer, config.train.seed, state, batch)

        def run() -> Any:
            nonlocal state
            state, metrics = step(state, batch)
            return state, metrics

        seconds = timed(run, repetitions)
    units = {name: counts[name] for name in COUNTED if name in counts}
    shape = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1) or "one device"
    return _measured(
        "train step", f"{experiment.rows} rows, {shape}", seconds, units, experiment.flops, list(mesh.devices.flat)
    )


def _measured(
    name: str,
    shape: str,
    seconds: tuple[float, ...],
    units: dict[str, float],
    flops: float,
    devices: Sequence[jax.Device],
) -> Timing:
    devices = list(devices)
    stats = [device.memory_stats() or {} for device in devices if device.process_index == jax.process_index()]
    memory = max(float(stat.get("peak_bytes_in_use", 0)) for stat in stats)
    peak = peak_flops(devices[0].device_kind)
    return Timing(name, shape, seconds, units, flops, len(devices), peak, memory)


def describe(timings: Sequence[Timing]) -> str:
    """The timings as a table, "-" where a figure is not known."""
    columns = ("median ms", "min", "max", "GFLOP/s", "MFU", "GiB")
    lines = [f"{'':18s}{'':26s}" + "".join(f"{name:>11s}" for name in columns) + "  a second"]
    for timing in timings:
        cells = [f"{1e3 * seconds:,.2f}" for seconds in (timing.median, min(timing.seconds), max(timing.seconds))]
        cells += [
            f"{timing.flops_per_s / 1e9:,.1f}" if timing.flops else "-",
            f"{timing.mfu:.1%}" if timing.mfu else "-",
            f"{timing.memory / (1 << 30):.2f}" if timing.memory else "-",
        ]
        rates = ", ".join(f"{rate:,.1f} {unit}" for unit, rate in timing.rates.items())
        lines.append(f"{timing.name:18s}{timing.shape:26s}" + "".join(f"{cell:>11s}" for cell in cells) + f"  {rates}")
    return "\n".join(lines)
