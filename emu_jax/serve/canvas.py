"""Images that are drawn at the same time, each in a place of its own, at its own step of its own sampler.

A sampler is a table of numbers (`generate/samplers.py`), so images of different samplers, lengths, guidance and
progress share a U-Net call: each reads its own row. An image does not depend on its neighbours: it is the one that
`Emu.generate_image` draws.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence as Ordered
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image

from emu_jax.generate.model import Emu, GeneratedImage
from emu_jax.generate.samplers import HISTORY, Table, advance, empty_history, make_table
from emu_jax.models import unet
from emu_jax.models.layers import Array
from emu_jax.serve.sequences import Sequence
from emu_jax.serve.slots import Reader


@dataclasses.dataclass(frozen=True)
class Drawing:
    """An image to be drawn, of a prompt that ends in [IMG]."""

    sequence: Sequence
    sampler: str
    steps: int
    guidance: float
    seed: int


@dataclasses.dataclass
class _Place:
    """What is drawn in a place: its table, the row that comes next, and what it is drawn from."""

    drawing: Drawing
    table: Table
    embeddings: np.ndarray  # [Q, D]
    row: int = 0


def _table(fields: dict[str, Any]) -> Table:
    """A table of NumPy arrays, which are on no device yet."""
    arrays: dict[str, Any] = {name: np.asarray(value, np.float32) for name, value in fields.items()}
    return Table(**arrays)


IDLE = _table(  # a row that changes nothing
    {
        "timestep": 0,
        "scale": 1,
        "from_x": 0,
        "from_eps": 1,
        "x_coef": 1,
        "history_coef": [0] * HISTORY,
        "remember": 0,
        "initial_scale": 0,
    }
)


class Canvas:
    """`count` images at a time by one model with a decoder. Not for several threads."""

    def __init__(self, model: Emu, count: int):
        if model.decoder is None:
            raise ValueError("the model has no decoder")
        self.model, self.decoder, self.count = model, model.decoder, count
        self.reader = Reader(model)
        self._unconditional = model.unconditional[0]  # [Q, D]
        self.clear()

    def clear(self) -> None:
        """Frees all places."""
        self._places: list[_Place | None] = [None] * self.count
        noise = self.decoder.initial_latents([0] * self.count, self.decoder.size, self.decoder.size)
        # Committed to a device, as what programs return is; else they would compile twice.
        place = jax.tree.leaves(self.decoder.unet_params)[0].sharding
        self._x = jax.device_put(jnp.zeros_like(noise), place)
        self._history = jax.device_put(empty_history(noise.shape), place)
        self._both = np.stack([self._unconditional] * 2 * self.count)  # [2N, Q, D]

    @property
    def free(self) -> list[int]:
        """Places in which nothing is drawn."""
        return [number for number, place in enumerate(self._places) if place is None]

    @property
    def active(self) -> bool:
        """Whether anything is being drawn."""
        return any(place is not None for place in self._places)

    def release(self, number: int) -> None:
        """Stops drawing in a place."""
        self._places[number] = None

    def begin(self, numbers: Ordered[int], drawings: Ordered[Drawing]) -> None:
        """Generates the embeddings of images and puts their noise in free places."""
        embeddings = self.reader.generate_embeddings(
            [drawing.sequence for drawing in drawings], self.count
        )  # [n, Q, D]
        for number, drawing, embedded in zip(numbers, drawings, embeddings, strict=True):
            table = make_table(drawing.sampler, self.decoder.schedule, drawing.steps)
            self._places[number] = _Place(drawing, table, embedded)
            self._both[self.count + number] = embedded
            noise = self.decoder.initial_latents([drawing.seed], self.decoder.size, self.decoder.size)
            start = np.float32(table.initial_scale)
            self._x, self._history = _put(self._x, self._history, np.int32(number), noise, start)

    def step(self) -> dict[int, tuple[int, int]]:
        """One U-Net call for all places: {place: (calls made, calls in all)} of what is drawn."""
        rows = [
            IDLE if place is None else jax.tree.map(lambda column, at=place.row: column[at], _columns(place.table))
            for place in self._places
        ]
        row = jax.tree.map(lambda *values: np.stack(values), *rows)
        guidance = np.array([1.0 if place is None else place.drawing.guidance for place in self._places], np.float32)
        self._x, self._history = _advance(
            self.decoder.unet_params, row, self._x, self._history, self._both, guidance, config=self.decoder.unet_config
        )
        progress = {}
        for number, place in enumerate(self._places):
            if place is not None:
                place.row += 1
                progress[number] = (place.row, len(place.table.timestep))
        return progress

    def finish(self, number: int) -> GeneratedImage:
        """The image in a place whose calls are all made; frees it."""
        place = self._places[number]
        if place is None or place.row < len(place.table.timestep):
            raise ValueError(f"place {number} holds no finished image")
        self._places[number] = None
        images, flags = self.decoder.decode(self._x[number : number + 1])
        return GeneratedImage(PIL.Image.fromarray(images[0]), place.embeddings, place.drawing.seed, flags[0])

    def warm_up(self) -> None:
        """Compiles all that `begin`, `step` and `finish` will run."""
        size = self.model.config.vision.image_size
        for length in self.reader.lengths:
            count = length if length < self.reader.lengths[-1] else length - self.model.config.causal.queries
            tokens = np.full(count, self.model.tokenizer.img_id, np.int32)
            sequence = Sequence(tokens, np.full(count, -1, np.int32), np.zeros((0, size, size, 3), np.uint8))
            self.begin([0], [Drawing(sequence, "ddim", 1, 1.0, 0)])
        while self._places[0] is not None:
            done, calls = self.step()[0]
            if done == calls:
                self.finish(0)


def _columns(table: Table) -> Table:
    """A table whose every field has a row a call."""
    fields = {field.name: getattr(table, field.name) for field in dataclasses.fields(table)}
    return _table(fields | {"initial_scale": [0] * len(table.timestep)})


@functools.partial(jax.jit, donate_argnames=("x", "history"))
def _put(x: Array, history: Array, number: Array, noise: Array, scale: Array) -> tuple[Array, Array]:
    """x [N, h, w, C] and history [HISTORY - 1, N, h, w, C] with noise [1, h, w, C] in a place, nothing remembered."""
    return x.at[number].set(scale * noise[0]), history.at[:, number].set(0.0)


@functools.partial(jax.jit, static_argnames="config", donate_argnames=("x", "history"))
def _advance(
    params: unet.Params,
    row: Table,
    x: Array,
    history: Array,
    both: Array,
    guidance: Array,
    *,
    config: unet.UNetConfig,
) -> tuple[Array, Array]:
    return advance(params, row, x, history, both, guidance, config=config)
