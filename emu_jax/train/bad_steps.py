"""Which steps are bad, decided on the devices: a bad step advances the step number and changes nothing else.

A step is bad if its gradient norm, its loss or the square of a learning rate is not finite, or, on request, if its
gradient norm is a spike. The state counts bad steps; `bad_step_report.py` reads the counts and stops the run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

WINDOW = 64  # steps over which the median of the gradient norm runs

BadSteps = dict[str, jax.Array]  # in_a_row, total: int32 []; with `skip_spikes` also norms: float32 [WINDOW]


def initial(skip_spikes: float) -> BadSteps:
    """No bad step so far; a norm of 0 has still to come."""
    counts = {"in_a_row": jnp.zeros((), jnp.int32), "total": jnp.zeros((), jnp.int32)}
    return counts | ({"norms": jnp.zeros(WINDOW, jnp.float32)} if skip_spikes else {})


def judge(
    bad_steps: BadSteps, step: jax.Array, numbers: Sequence[jax.Array], skip_spikes: float
) -> tuple[jax.Array, BadSteps, dict[str, jax.Array]]:
    """Whether a step is good, bool []; the new counts; and metrics, float32 [].

    A gradient norm is judged by the median of the norms of good steps, once there are `WINDOW` of them.

    Args:
      step: steps done before this one, int32 [].
      numbers: what must be finite, each []; the first one is the gradient norm.
      skip_spikes: multiple of the median above which a gradient norm is a spike; 0 judges none.
    """
    good = jnp.isfinite(jnp.stack([*numbers])).all()
    new, metrics, grad_norm = {}, {}, numbers[0]
    if skip_spikes:
        norms, place = bad_steps["norms"], step % WINDOW
        ratio = jnp.where((norms > 0.0).all(), grad_norm / jnp.median(norms), 0.0)
        good &= ratio <= skip_spikes
        new["norms"] = norms.at[place].set(jnp.where(good, grad_norm, norms[place]))
        metrics["grad_norm_ratio"] = ratio
    new["in_a_row"] = jnp.where(good, 0, bad_steps["in_a_row"] + 1)
    new["total"] = bad_steps["total"] + ~good
    metrics["bad_steps"] = new["total"].astype(jnp.float32)
    metrics["bad_steps_in_a_row"] = new["in_a_row"].astype(jnp.float32)
    return good, new, metrics


def select(good: jax.Array, new: Any, old: Any) -> Any:
    """The new tree after a good step, otherwise the old one, bit for bit."""
    return jax.tree.map(lambda a, b: jnp.where(good, a, b), new, old)
