"""How fast input, decoding, drawing and training run on this machine's devices, with random weights.

In: a config. Out: `Timing`s. Decoding and drawing run on one device, training on the config's mesh over the devices of
this process.

    input          the first batches of the config's pipeline, image decoding included
    decode         greedy text generation from embedded prompts with a KV cache; </s> is forbidden
    draw           guided PNDM steps of the U-Net, without the VAE
    train step     the loop's compiled step on a batch of the pipeline; the state is donated
"""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from emu_jax.chips import peak_flops
from emu_jax.config import load_config
from emu_jax.data.counts import figures
from emu_jax.errors import UserError
from emu_jax.generate import text
from emu_jax.generate.samplers import make_table, sample
from emu_jax.models import emu, unet
from emu_jax.models.diffusion import Schedule
from emu_jax.models.flops import forward_flops, unet_forward_flops
from emu_jax.sharding import make_mesh
from emu_jax.train.fit import fit
from emu_jax.train.global_batch import batch_shardings
from emu_jax.train.interval import PER_SECOND
from emu_jax.train.optimizer import OptimizerConfig
from emu_jax.train.state import create_state
from emu_jax.train.step import compile_step
from emu_jax.train.tasks.task import Inputs, Task, make_task

# The U-Net's config and the side of its latents, for images of 64 and of 512 pixels.
UNETS = {"quickstart": ("configs/decoder.py", 8), "sd15": ("configs/decoder.py:published", 64)}
LATENT_CHANNELS, SAMPLER_STEPS, GUIDANCE = 4, 50, 7.5
BATCH_SIZES = (1, 8)  # of prompts decoded and of images drawn
TOKENS = 64  # tokens of a prompt and of its continuation, unless the model's context is shorter
INPUT_BATCHES = 16  # batches timed together, because the pipeline reads ahead
REPETITION_SECONDS = 0.2  # least length of a repetition: short calls run several times, without waiting in between


@dataclasses.dataclass(frozen=True)
class Timing:
    """Timings of one kind of call.

    Attributes:
      seconds: seconds of a call, one value per repetition.
      units: results of a call, as in {"tokens": 64.0}.
      flops: FLOPs of a call over all devices; 0 where they are not counted.
      devices: number of devices in use.
      peak_flops: bfloat16 peak of a device, FLOP/s; 0 where it is not known.
      memory: most bytes that any device has held since the process started; 0 where devices do not report it.
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
        """Units per second."""
        return {unit: count / self.median for unit, count in self.units.items()}

    @property
    def flops_per_s(self) -> float:
        return self.flops / self.median

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation: counted FLOPs over the devices' bfloat16 peak; 0 where that is not known."""
        return self.flops_per_s / (self.devices * self.peak_flops) if self.peak_flops else 0.0

    def to_json(self) -> dict[str, Any]:
        derived = {"median": self.median, "rates": self.rates, "flops_per_s": self.flops_per_s, "mfu": self.mfu}
        return dataclasses.asdict(self) | derived


def bench(config: ConfigDict, *, size: str = "quickstart", repetitions: int = 5) -> list[Timing]:
    """Times input and training step of a config's task, and what else the task can time (`Task.timings`).

    Args:
      size: the U-Net to draw with, one of `UNETS`; its condition is as wide as the model's embeddings.

    Raises:
      UserError: a setting cannot work.
    """
    if repetitions < 1:
        raise UserError(f"repetitions={repetitions}; expected at least 1")
    if size not in UNETS:
        raise UserError(f"size={size} is unknown; choose one of {', '.join(UNETS)}")
    task, inputs = make_task(fit(config, jax.devices()))
    try:
        # Training comes last, because it needs the most memory.
        found = [_input(inputs, repetitions)]
        for name in task.timings:
            found += TIMINGS[name](task, size, repetitions)
        return [*found, _train(task, inputs, repetitions)]
    finally:
        inputs.stream.close()


def timed(run: Callable[[], Any], repetitions: int) -> tuple[float, ...]:
    """Seconds of a call for each repetition, after two calls that compile and fault pages in."""
    jax.block_until_ready(run())
    started = time.perf_counter()
    jax.block_until_ready(run())
    calls = math.ceil(REPETITION_SECONDS / (time.perf_counter() - started))
    seconds = []
    for _ in range(repetitions):
        started = time.perf_counter()
        for _ in range(calls):
            result = run()
        jax.block_until_ready(result)
        seconds.append((time.perf_counter() - started) / calls)
    return tuple(seconds)


def _input(inputs: Inputs, repetitions: int) -> Timing:
    """Times batches; their tokens and images are means over all batches, because rows are not equally full."""
    counts, seconds = [], []
    for number in range(repetitions + 1):
        started = time.perf_counter()
        batches = [(next(inputs.stream), figures([inputs.stream.counts()])) for _ in range(INPUT_BATCHES)]
        if number:  # the first repetition starts threads or processes
            seconds.append((time.perf_counter() - started) / INPUT_BATCHES)
        counts += [count for _, count in batches]
    units = {name: float(np.mean([count[name] for count in counts])) for name in PER_SECOND if name in counts[0]}
    rows = len(jax.tree.leaves(batches[0][0])[0])
    return Timing("input", f"{rows} rows", tuple(seconds), {"rows": float(rows)} | units)


def _decode(task: Any, size: str, repetitions: int) -> list[Timing]:
    config: emu.EmuConfig = task.model
    params = emu.init(config, jax.random.key(0))
    tokens = min(TOKENS, config.llama.context // 4)
    found = []
    for rows in BATCH_SIZES:
        inputs = jax.random.normal(jax.random.key(1), (rows, tokens, config.llama.width))
        valid = jnp.ones((rows, tokens), bool)
        static = {"config": config, "ends": (0,), "max_new_tokens": tokens}
        decoding = text.Decoding(min_length=tokens + 2)  # never </s>: every row writes all its tokens
        run = functools.partial(text.generate, params, inputs, valid, jax.random.key(0), decoding, **static)
        # The language model over prompt and continuation, and the token head over the continuation only.
        forward = forward_flops(config, 0, rows, 2 * tokens)
        flops = forward["llama"] + forward["adapters"] + forward["attention"]
        flops += 2.0 * rows * tokens * config.llama.width * config.llama.vocab_size
        shape = f"{rows} x {tokens} tokens after {tokens}"
        units = {"tokens": float(rows * tokens)}
        found.append(_measured("decode", shape, timed(run, repetitions), units, flops, jax.devices()[:1]))
    return found


def _draw(task: Any, size: str, repetitions: int) -> list[Timing]:
    model: emu.EmuConfig = task.model
    spec, latent = UNETS[size]
    drawing = load_config(spec)
    drawing.unet.update({"latent_channels": LATENT_CHANNELS, "condition_dim": model.llama.width})
    config = unet.UNetConfig.from_dict(drawing.unet)
    params = unet.init(config, jax.random.key(0))
    table = make_table("pndm", Schedule.from_dict(drawing.schedule), SAMPLER_STEPS)
    found = []
    for images in BATCH_SIZES:
        noise = jax.random.normal(jax.random.key(1), (images, latent, latent, LATENT_CHANNELS))
        shape = (2, images, model.causal.queries, model.llama.width)
        condition, unconditional = jax.random.normal(jax.random.key(2), shape)
        run = functools.partial(sample, params, table, noise, condition, unconditional, GUIDANCE, config=config)
        calls = len(table.timestep)  # each of both halves, with and without the condition
        flops = calls * sum(unet_forward_flops(config, 2 * images, latent, model.causal.queries).values())
        what = f"{images} of {latent} x {latent}, {SAMPLER_STEPS} steps"
        units = {"images": float(images)}
        found.append(_measured("draw", what, timed(run, repetitions), units, flops, jax.devices()[:1]))
    return found


# What a task may name in `Task.timings`: (task, size, repetitions) -> timings.
TIMINGS: dict[str, Callable[[Any, str, int], list[Timing]]] = {"decode": _decode, "draw": _draw}


def _train(task: Task, inputs: Inputs, repetitions: int) -> Timing:
    config, optimizer = inputs.config, OptimizerConfig.from_dict(inputs.config.optimizer)
    mesh = make_mesh(config.train.mesh)
    arrays = next(inputs.stream)
    counts = figures([inputs.stream.counts()])
    with jax.set_mesh(mesh):
        state = create_state(task, optimizer, config.train.seed, mesh)
        batch = task.batch(**jax.device_put(arrays, batch_shardings(mesh, arrays)))
        step = compile_step(task, optimizer, config.train.seed, state, batch)

        def run() -> Any:
            nonlocal state
            state, metrics = step(state, batch)
            return state, metrics

        seconds = timed(run, repetitions)
    units = {name: counts[name] for name in PER_SECOND if name in counts}
    shape = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1) or "one device"
    flops = sum(task.flops().values())
    return _measured("train step", f"{task.rows} rows, {shape}", seconds, units, flops, list(mesh.devices.flat))


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
