"""What is seen of a run at a step, beside its losses: it goes into its metrics, TensorBoard and its trackers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8


@dataclasses.dataclass(frozen=True)
class Observation:
    """Each by its name.

    Attributes:
      numbers: join the step's row in metrics.jsonl.
      images: for TensorBoard and trackers.
      histograms: values whose distribution these show.
    """

    numbers: Mapping[str, float] = dataclasses.field(default_factory=dict)
    images: Mapping[str, UInt8[np.ndarray, "H W 3"]] = dataclasses.field(default_factory=dict)
    histograms: Mapping[str, Float[np.ndarray, " n"]] = dataclasses.field(default_factory=dict)


# step, parameters, statistics -> what is seen of the model at that step
Observe = Callable[[int, dict[str, Any], dict[str, Any]], Observation]
NOTHING = Observation()


def merged(observations: Sequence[Observation]) -> Observation:
    """What several observers see at one step; their names differ."""
    groups = ("numbers", "images", "histograms")
    parts = {group: {k: v for each in observations for k, v in getattr(each, group).items()} for group in groups}
    return Observation(**parts)
