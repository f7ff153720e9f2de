"""Continuous batching of drawings: each has a slot and is at its own step of its own sampler.

A sampler is a table of numbers (`generate/samplers.py`), so images with different samplers, numbers of steps, guidance
scales and progress share a U-Net call: each uses its own row. An image does not depend on its neighbours: it is the one
that `Emu.generate_image` draws.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
from jaxtyping import Array, Float, Int

from emu_jax.generate.model import Emu, GeneratedImage
from emu_jax.generate.samplers import Table, advance, as_table, empty_history, make_table, unchanged_rows
from emu_jax.serve.encoded_prompt import EncodedPrompt
from emu_jax.serve.prompt_batching import PromptBatcher


@dataclasses.dataclass(frozen=True)
class ImageRequest:
    """An image to draw; the prompt ends in [IMG]."""

    prompt: EncodedPrompt
    sampler: str
    steps: int
    guidance: float
    seed: int


@dataclasses.dataclass
class _Slot:
    """An image in progress; `row` is the next row of its table."""

    request: ImageRequest
    table: Table
    embeddings: Float[np.ndarray, "Q D"]
    row: int = 0


def _row(table: Table, number: int) -> Table:
    """One row of a table: scalars."""
    return jax.tree.map(lambda field: field[number] if field.ndim else field, table)


# Leaves latents and history unchanged.
IDENTITY_ROW = _row(as_table(unchanged_rows(np.zeros(1)) | {"remember": np.zeros(1)}), 0)


class ImageBatcher:
    """Draws up to `slots` images at a time with one model that has a decoder. Not thread-safe."""

    def __init__(self, model: Emu, slots: int):
        if model.decoder is None:
            raise ValueError("the model has no decoder")
        self.model, self.decoder, self.slots = model, model.decoder, slots
        self.prompts = PromptBatcher(model)
        self._unconditional = model.unconditional[0]  # [Q, D]
        self.clear()

    def clear(self) -> None:
        """Frees all slots."""
        self._slots: list[_Slot | None] = [None] * self.slots
        noise = self.decoder.initial_latents([0] * self.slots)
        # Commit to a device like the outputs of `_advance`, or it compiles twice.
        device = jax.tree.leaves(self.decoder.unet_params)[0].sharding
        self._x = jax.device_put(jnp.zeros_like(noise), device)
        self._history = jax.device_put(empty_history(noise.shape), device)
        self._conditions = np.stack([self._unconditional] * 2 * self.slots)  # [2N, Q, D], the unconditional half first

    @property
    def free(self) -> list[int]:
        """The free slots."""
        return [number for number, slot in enumerate(self._slots) if slot is None]

    def release(self, number: int) -> None:
        """Frees a slot."""
        self._slots[number] = None

    def begin(self, numbers: Sequence[int], requests: Sequence[ImageRequest]) -> None:
        """Generates the embeddings of new images and puts their initial noise into free slots."""
        embeddings = self.prompts.generate_embeddings([request.prompt for request in requests], self.slots)
        for number, request, embedded in zip(numbers, requests, embeddings, strict=True):
            table = make_table(request.sampler, self.decoder.schedule, request.steps)
            self._slots[number] = _Slot(request, table, embedded)
            self._conditions[self.slots + number] = embedded
            noise = self.decoder.initial_latents([request.seed])
            scale = np.float32(table.initial_scale)
            self._x, self._history = _put(self._x, self._history, np.int32(number), noise, scale)

    def step(self) -> dict[int, tuple[int, int]]:
        """One U-Net call for all slots; returns (calls made, calls in total) by slot."""
        rows = [IDENTITY_ROW if slot is None else _row(slot.table, slot.row) for slot in self._slots]
        row = jax.tree.map(lambda *values: np.stack(values), *rows)
        guidance = np.array([1.0 if slot is None else slot.request.guidance for slot in self._slots], np.float32)
        arrays = (row, self._x, self._history, self._conditions, guidance)
        self._x, self._history = _advance(self.decoder.unet_params, *arrays, config=self.decoder.unet_config)
        progress = {}
        for number, slot in enumerate(self._slots):
            if slot is not None:
                slot.row += 1
                progress[number] = (slot.row, len(slot.table.timestep))
        return progress

    def finish(self, number: int) -> GeneratedImage:
        """Decodes the image of a slot after its last call, and frees the slot."""
        slot = self._slots[number]
        if slot is None or slot.row < len(slot.table.timestep):
            raise ValueError(f"slot {number} holds no finished image")
        self._slots[number] = None
        images, flags = self.decoder.decode(self._x[number : number + 1])
        return GeneratedImage(PIL.Image.fromarray(images[0]), slot.embeddings, slot.request.seed, flags[0])

    def warm_up(self) -> Iterator[None]:
        """Compiles all programs of `begin`, `step` and `finish`, some before each yield; then all slots are free."""
        size = self.model.config.vision.image_size
        for length in self.prompts.lengths:
            is_longest = length == self.prompts.lengths[-1]
            count = length - self.model.config.causal.queries if is_longest else length
            tokens = np.full(count, self.model.tokenizer.img_id, np.int32)
            prompt = EncodedPrompt(tokens, np.full(count, -1, np.int32), np.zeros((0, size, size, 3), np.uint8))
            self.begin([0], [ImageRequest(prompt, "ddim", 1, 1.0, 0)])
            while self._slots[0] is not None:
                made, calls = self.step()[0]
                if made == calls:
                    self.finish(0)
            yield


@functools.partial(jax.jit, donate_argnames=("x", "history"))
def _put(
    x: Float[Array, "N h w C"],
    history: Float[Array, "K N h w C"],
    number: Int[Array, ""],
    noise: Float[Array, "1 h w C"],
    scale: Float[Array, ""],
) -> tuple[Float[Array, "N h w C"], Float[Array, "K N h w C"]]:
    """Puts scaled noise into slot `number`, and clears its history."""
    return x.at[number].set(scale * noise[0]), history.at[:, number].set(0.0)


_advance = jax.jit(advance, static_argnames="config", donate_argnames=("x", "history"))
