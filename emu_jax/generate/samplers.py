"""Samplers: noise -> latents by calls of the U-Net at falling timesteps; one signature, one compiled loop.

Every sampler here is linear in its model outputs, so each is a table of coefficients with one row per U-Net call:

    eps    = guided(unet(scale * x, timestep))         classifier-free guidance (CFG): one call on both halves, the
                                                       conditional and the unconditional one
    model  = from_x * x + from_eps * eps               eps itself, or the image that it implies
    x      = x_coef * x + sum_k history_coef[k] * model[k calls ago]

`lax.scan` runs down the table. Guidance scale, seed, and even the sampler are data: only a new number of rows compiles.

    pndm   Liu et al. 2022 (arXiv 2202.09778), pseudo linear multistep, no Runge-Kutta steps; steps + 1 calls
    ddim   Song et al. 2021 (arXiv 2010.02502), eta = 0
    euler  Karras et al. 2022 (arXiv 2206.00364), algorithm 2 without churn
    dpmpp  Lu et al. 2022 (arXiv 2211.01095), DPM-Solver++ 2M, midpoint, last step of first order

Timesteps are a whole number apart and shifted by the schedule's offset ("leading"); dpmpp's are spread evenly from the
last timestep down ("linspace"). Both are the reference implementations' defaults.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Real

from emu_jax.errors import UserError, nearest
from emu_jax.models import unet
from emu_jax.models.diffusion import Schedule

HISTORY = 4  # model outputs that a step may use, its own included


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Table:
    """A sampler for a number of steps, in float32: one row per U-Net call, and the scale of the initial noise."""

    timestep: Float[Array, " R"]
    scale: Float[Array, " R"]  # of the U-Net's input
    from_x: Float[Array, " R"]
    from_eps: Float[Array, " R"]
    x_coef: Float[Array, " R"]
    history_coef: Float[Array, "R K"]  # K = HISTORY, newest first
    remember: Float[Array, " R"]  # 1 where the model output enters the history
    initial_scale: Float[Array, ""]


def unchanged_rows(timesteps: np.ndarray) -> dict[str, np.ndarray]:
    """A table whose rows leave x unchanged."""
    count = len(timesteps)
    return {
        "timestep": timesteps.astype(np.float64),
        "scale": np.ones(count),
        "from_x": np.zeros(count),
        "from_eps": np.ones(count),
        "x_coef": np.ones(count),
        "history_coef": np.zeros((count, HISTORY)),
        "remember": np.ones(count),
        "initial_scale": np.ones(()),
    }


def _leading(schedule: Schedule, steps: int) -> np.ndarray:
    """`steps` falling timesteps, `train_steps // steps` apart."""
    return np.arange(steps)[::-1] * (schedule.train_steps // steps) + schedule.offset


def _transfer(schedule: Schedule, start: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(a, b) of x(end) = a * x(start) + b * eps; a negative timestep stands for the first one."""
    now, then = (schedule.alphas_bar[np.maximum(t, 0)] for t in (start, end))
    a = np.sqrt(then / now)
    return a, np.sqrt(1.0 - then) - a * np.sqrt(1.0 - now)


def _ddim(schedule: Schedule, steps: int) -> dict[str, np.ndarray]:
    timesteps = _leading(schedule, steps)
    rows = unchanged_rows(timesteps)
    rows["x_coef"], rows["history_coef"][:, 0] = _transfer(
        schedule, timesteps, timesteps - schedule.train_steps // steps
    )
    return rows


# Adams-Bashforth weights of the newest 1, 2, 3, 4 noise predictions.
MULTISTEP = ((1.0,), (1.5, -0.5), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def _pndm(schedule: Schedule, steps: int) -> dict[str, np.ndarray]:
    timesteps, stride = _leading(schedule, steps), schedule.train_steps // steps
    a, b = _transfer(schedule, timesteps, timesteps - stride)
    if steps == 1:
        return _ddim(schedule, steps)
    # The first step is taken twice, the second time with the mean of the predictions at both its ends. The correction
    # is linear in them: x + b * (mean - first). That second prediction is not remembered.
    rows = unchanged_rows(np.insert(timesteps, 1, timesteps[1]))
    rows["x_coef"] = np.insert(a, 1, 1.0)
    rows["history_coef"][0, 0] = b[0]
    rows["history_coef"][1, :2] = b[0] / 2, -b[0] / 2
    rows["remember"][1] = 0.0
    for row, factor in enumerate(b[1:], start=2):
        weights = MULTISTEP[min(row, HISTORY) - 1]
        rows["history_coef"][row, : len(weights)] = factor * np.array(weights)
    return rows


def _sigmas(schedule: Schedule, timesteps: np.ndarray) -> np.ndarray:
    """Ratio of noise to signal at the timesteps, then 0 for the end; [R + 1]."""
    alphas_bar = schedule.alphas_bar[timesteps]
    return np.append(np.sqrt((1.0 - alphas_bar) / alphas_bar), 0.0)


def _euler(schedule: Schedule, steps: int) -> dict[str, np.ndarray]:
    timesteps = _leading(schedule, steps)
    rows, sigmas = unchanged_rows(timesteps), _sigmas(schedule, timesteps)
    rows["scale"] = 1.0 / np.sqrt(sigmas[:-1] ** 2 + 1.0)
    rows["history_coef"][:, 0] = np.diff(sigmas)
    rows["initial_scale"] = np.sqrt(sigmas[0] ** 2 + 1.0)
    return rows


def _dpmpp(schedule: Schedule, steps: int) -> dict[str, np.ndarray]:
    timesteps = np.linspace(schedule.train_steps - 1, 0, steps + 1).round().astype(int)[:-1]
    ratios = _sigmas(schedule, timesteps)
    alpha = 1.0 / np.sqrt(ratios**2 + 1.0)  # [R + 1]
    sigma = ratios * alpha
    rows = unchanged_rows(timesteps)
    rows["from_x"], rows["from_eps"] = 1.0 / alpha[:-1], -ratios[:-1]  # the image that eps implies
    rows["x_coef"] = sigma[1:] / sigma[:-1]
    with np.errstate(divide="ignore"):
        log_snr = -np.log(ratios)  # infinite at the end
    h = np.diff(log_snr)
    new = -alpha[1:] * np.expm1(-h)
    rows["history_coef"][:, 0] = new
    for row in range(1, steps - 1):
        share = h[row] / (2.0 * h[row - 1])
        rows["history_coef"][row, :2] = new[row] * (1.0 + share), -new[row] * share
    return rows


Sampler = Callable[[Schedule, int], dict[str, np.ndarray]]  # schedule and steps -> the fields of `Table`
SAMPLERS: dict[str, Sampler] = {
    "pndm": _pndm,
    "ddim": _ddim,
    "euler": _euler,
    "dpmpp": _dpmpp,
}
ENTRY_POINTS = "emu_jax.samplers"  # the group in which an installed package names its own samplers


def sampler_names() -> list[str]:
    """The names of all samplers, those of installed packages last."""
    return list(dict.fromkeys([*SAMPLERS, *importlib.metadata.entry_points(group=ENTRY_POINTS).names]))


def find_sampler(name: str) -> Sampler:
    """One of `SAMPLERS`, or the sampler of an installed package.

    Raises:
      UserError: there is no such sampler, or it cannot be imported.
    """
    if name in SAMPLERS:
        return SAMPLERS[name]
    added = importlib.metadata.entry_points(group=ENTRY_POINTS)
    if name not in added.names:
        raise UserError(f"sampler={name!r} is unknown; did you mean {nearest(name, sampler_names())}?")
    try:
        return added[name].load()
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"sampler={name!r}: {added[name].value} cannot be imported ({error}); expected a function of a schedule "
            "and a number of steps"
        ) from error


@functools.lru_cache(maxsize=64)
def make_table(sampler: str, schedule: Schedule, steps: int) -> Table:
    """The table of a sampler.

    >>> make_table("ddim", Schedule(), 4).timestep.tolist()
    [751.0, 501.0, 251.0, 1.0]
    >>> make_table("pndm", Schedule(), 4).timestep.tolist()  # the second step is taken twice
    [751.0, 501.0, 501.0, 251.0, 1.0]
    >>> make_table("eulr", Schedule(), 4)
    Traceback (most recent call last):
    emu_jax.errors.UserError: sampler='eulr' is unknown; did you mean euler?

    Raises:
      UserError: an unknown sampler, or more steps than it has timesteps.
    """
    fields = find_sampler(sampler)
    most = schedule.train_steps - schedule.offset
    if not 1 <= steps <= most:
        raise UserError(f"steps={steps}; expected 1 to {most} with sampler={sampler!r}, usually 20 to 50")
    return as_table(fields(schedule, steps))


def as_table(rows: dict[str, np.ndarray]) -> Table:
    """A table of NumPy arrays, until a compiled loop takes them."""
    fields = {name: value.astype(np.float32) for name, value in rows.items()}
    return Table(**fields)  # type: ignore[arg-type]


def empty_history(shape: tuple[int, ...]) -> Float[Array, "K N h w C"]:
    """The history before the first row, for latents of this shape [N, h, w, C]; K = HISTORY - 1."""
    return jnp.zeros((HISTORY - 1, *shape), jnp.float32)


def advance(
    params: unet.Params,
    row: Table,
    x: Float[Array, "N h w C"],
    history: Float[Array, "K N h w C"],
    conditions: Float[Array, "2*N Q D"],
    guidance: float | Real[Array, " ..."],
    *,
    config: unet.UNetConfig,
) -> tuple[Float[Array, "N h w C"], Float[Array, "K N h w C"]]:
    """Advances latents and history by one row of a table, i.e. one U-Net call.

    Args:
      row: scalars; or fields [N, …], one row for each of N independent images with tables of their own.
      history: the last HISTORY - 1 model outputs, newest first.
      conditions: embeddings, the unconditional half first.
      guidance: guidance scale, one for all images or one per image.
    """
    count = len(x)

    def per_image(value: float | Array) -> Float[Array, "N 1 1 1"]:
        return jnp.broadcast_to(jnp.asarray(value), count)[:, None, None, None]

    inputs = per_image(row.scale) * x
    timesteps = jnp.broadcast_to(row.timestep, count)
    eps = unet.apply(
        params, jnp.concatenate([inputs, inputs]), jnp.concatenate([timesteps, timesteps]), conditions, config=config
    )
    unconditional, conditional = jnp.split(eps, 2)
    eps = unconditional + per_image(guidance) * (conditional - unconditional)
    model = per_image(row.from_x) * x + per_image(row.from_eps) * eps
    outputs = jnp.concatenate([model[None], history])  # [HISTORY, N, h, w, C]
    coefficients = jnp.broadcast_to(row.history_coef, (count, HISTORY))
    x = per_image(row.x_coef) * x + jnp.einsum("nk,knhwc->nhwc", coefficients, outputs)
    return x, jnp.where(per_image(row.remember)[None] > 0, outputs[:-1], history)


@functools.partial(jax.jit, static_argnames=("config", "trajectory"))
def sample(
    params: unet.Params,
    table: Table,
    noise: Float[Array, "N h w C"],
    condition: Float[Array, "N Q D"],
    unconditional: Float[Array, "N Q D"],
    guidance: float | Real[Array, ""],
    *,
    config: unet.UNetConfig,
    trajectory: bool = False,
) -> Float[Array, "N h w C"] | Float[Array, "R N h w C"]:
    """Latents from noise of variance 1, in float32.

    Args:
      guidance: guidance scale, in eps = unconditional + guidance * (conditional - unconditional).
      trajectory: return the latents after every row of the table.
    """
    conditions = jnp.concatenate([unconditional, condition])  # [2N, Q, D]

    def step(carry: tuple[Array, Array], row: Table) -> tuple[tuple[Array, Array], Array | None]:
        x, history = advance(params, row, *carry, conditions, guidance, config=config)
        return (x, history), (x if trajectory else None)

    x = table.initial_scale * noise.astype(jnp.float32)
    history = empty_history(x.shape)
    rows = dataclasses.replace(table, initial_scale=jnp.zeros(len(table.timestep)))
    (x, _), states = jax.lax.scan(step, (x, history), rows)
    return x if states is None else states
