"""Features of many images, which are read as they are needed: uint8 [H, W, 3] each -> [N, F]."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable

import numpy as np

from emu_jax.data.padding import pad_to
from emu_jax.errors import UserError


def in_batches(
    run: Callable[[list[np.ndarray]], np.ndarray], images: Iterable[np.ndarray], size: int = 16
) -> np.ndarray:
    """The features that `run` computes from batches of one size.

    Raises:
      UserError: there are no images.
    """
    images, rows = iter(images), []
    while batch := list(itertools.islice(images, size)):
        rows.append(np.asarray(run(pad_to(batch, size)))[: len(batch)])
    if not rows:
        raise UserError("no images to take features of; expected two or more")
    return np.concatenate(rows)
