"""Texts that are written at the same time, each in a slot of its own: one program for all, whatever joins or leaves.

    slot    0   [ question ][ answer so far │ free … ]      every slot has a cache as long as the context, and its own
            1   [ a longer question ][ answer │ free … ]    place in it; a new question may be read while the others
            2   [ free …                               ]    are being answered

Questions are read a few at a time, padded to one of few lengths, into the slots; then all slots go on by a few tokens
at once. Shapes are few and known beforehand (`warm_up`), so that nothing is compiled while people wait. A slot's tokens
do not depend on its neighbours: they are those that `Emu.generate_text` and `Chat` write.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence as Ordered
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from emu_jax.generate import embeddings as image
from emu_jax.generate import text
from emu_jax.generate.model import Emu
from emu_jax.generate.text import Decoding, Ends
from emu_jax.models import emu
from emu_jax.models.layers import Array
from emu_jax.models.llama import KVCache
from emu_jax.serve.sequences import Sequence
from emu_jax.sharding import with_logical_constraint

SHORTEST = 32  # positions; sequences are padded to it, its double, and so on up to the context
READ_TOGETHER = (1, 4)  # sequences that are read at a time, padded to one of these
IMAGES_TOGETHER = (1, 4, 16)
TOKENS_A_CALL = 4  # that every slot is ahead before anything else gets its turn


@dataclasses.dataclass(frozen=True)
class Start:
    """A text to be written.

    Attributes:
      limit: new tokens, at most. decoding: scalars. seed: of sampling.
    """

    sequence: Sequence
    decoding: Decoding
    limit: int
    seed: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _State:
    """B slots on the device."""

    cache: KVCache  # with an index for every slot
    token: Array  # int32 [B], the newest one, which the cache lacks
    count: Array  # int32 [B], new tokens so far
    left: Array  # int32 [B], that may follow; 0: the slot is free
    keys: Array  # [B] of randomness
    decoding: Decoding  # fields [B]


def lengths(context: int) -> list[int]:
    """Lengths that sequences are padded to: 32, 64, … and the context."""
    found, length = [], SHORTEST
    while length < context:
        found.append(length)
        length *= 2
    return [*found, context]


def fitting(count: int, sizes: Ordered[int]) -> int:
    """The smallest size that holds `count`, or the largest."""
    return next((size for size in sizes if size >= count), sizes[-1])


class Reader:
    """Images and sequences -> arrays of few shapes, for one model."""

    def __init__(self, model: Emu):
        self.model = model
        self.lengths = lengths(model.config.llama.context)

    def embed(self, sequences: Ordered[Sequence]) -> list[np.ndarray]:
        """All images' embeddings, float32 [n, Q, D] a sequence, encoded together."""
        images = np.concatenate([sequence.images for sequence in sequences])
        done: list[np.ndarray] = []
        while len(images):
            size = fitting(len(images), IMAGES_TOGETHER)
            some = images[:size]
            padded = np.zeros((size, *some.shape[1:]), np.uint8)
            padded[: len(some)] = some
            done += list(self.model.encode_images(padded)[: len(some)])
            images = images[size:]
        queries, width = self.model.config.causal.queries, self.model.config.llama.width
        found = np.stack(done) if done else np.zeros((0, queries, width), np.float32)
        ends = np.cumsum([len(sequence.images) for sequence in sequences])
        return np.split(found, ends[:-1])

    def stack(
        self, sequences: Ordered[Sequence], rows: int, *, right: bool
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Sequences -> tokens int32 [R, T], visual float32 [R, T, D], is_visual bool [R, T], valid bool [R, T].

        `right`: sequences stand at the right, with padding before them; else at the left.
        """
        length = fitting(max(len(sequence.tokens) for sequence in sequences), self.lengths)
        width = self.model.config.llama.width
        tokens = np.full((rows, length), self.model.tokenizer.pad_id, np.int32)
        visual = np.zeros((rows, length, width), np.float32)
        is_visual, valid = np.zeros((rows, length), bool), np.zeros((rows, length), bool)
        embedded = self.embed(sequences)
        for row, (sequence, images) in enumerate(zip(sequences, embedded, strict=True)):
            count = len(sequence.tokens)
            place = slice(length - count, length) if right else slice(0, count)
            seen = sequence.sources >= 0
            tokens[row, place], valid[row, place], is_visual[row, place] = sequence.tokens, True, seen
            visual[row, place][seen] = images.reshape(-1, width)[sequence.sources[seen]]
        valid[len(sequences) :, -1] = True  # rows of padding alone would attend to nothing
        return tokens, visual, is_visual, valid

    def generate_embeddings(self, sequences: Ordered[Sequence], rows: int) -> np.ndarray:
        """The next image's embeddings, float32 [N, Q, D], of prompts that end in [IMG]."""
        arrays = self.stack(sequences, rows, right=True)
        with self.model.scope():
            found = _generate_embeddings(self.model.params, *arrays, config=self.model.config)
        return np.asarray(found)[: len(sequences)]


class TextSlots:
    """`count` texts at a time by one model. Not for several threads."""

    def __init__(self, model: Emu, count: int):
        self.model, self.count, self.reader = model, count, Reader(model)
        self.capacity = model.config.llama.context
        self._static = {"config": model.config, "ends": model.ends}
        self.clear()

    def clear(self) -> None:
        """Frees all slots."""
        with self.model.scope():
            self._state = _empty(self.model.params, config=self.model.config, count=self.count)
        if self.model.mesh is None:  # committed to a device, as what programs return is; else `_read` compiles twice
            self._state = jax.device_put(self._state, self.model.params["llama"]["embed"]["embedding"].sharding)
        self._filled = np.zeros(self.count, int)  # cache slots of each text
        self._left = np.zeros(self.count, int)

    @property
    def free(self) -> list[int]:
        """Slots that nothing is written in."""
        return np.flatnonzero(self._left == 0).tolist()

    @property
    def active(self) -> bool:
        """Whether anything is being written."""
        return bool(self._left.any())

    def release(self, slot: int) -> None:
        """Stops writing in a slot."""
        if self._left[slot]:
            self._left[slot] = 0
            self._state = _release(self._state, np.int32(slot))

    def read(self, slots: Ordered[int], starts: Ordered[Start]) -> list[int]:
        """Reads prompts into free slots, at most `READ_TOGETHER[-1]`, and returns each one's first new token.

        A text that ends with it frees its slot.
        """
        rows = fitting(len(starts), READ_TOGETHER)
        tokens, visual, is_visual, valid = self.reader.stack([start.sequence for start in starts], rows, right=False)
        places = np.full(rows, self.count, np.int32)  # beyond the last slot: nothing is kept
        places[: len(slots)] = slots
        filled = list(starts) + [starts[-1]] * (rows - len(starts))
        decoding = _stack([start.decoding for start in filled])
        limits = np.array([start.limit for start in filled], np.int32)
        seeds = np.array([start.seed for start in filled], np.uint32)
        counts = valid.sum(1).astype(np.int32)
        params = self.model.params
        with self.model.scope():
            first, self._state = _read(
                params, self._state, places, tokens, visual, is_visual, counts, decoding, limits, seeds, **self._static
            )
        found = np.asarray(first)[: len(starts)].tolist()
        for slot, start, token in zip(slots, starts, found, strict=True):
            self._filled[slot] = len(start.sequence.tokens)
            self._left[slot] = 0 if token in self.model.ends else start.limit - 1
        return found

    def write(self) -> np.ndarray:
        """Goes on in all slots: int32 [TOKENS_A_CALL, B], -1 where nothing was written.

        What ends a text (`Emu.ends`) is among its tokens; it frees the slot, as its limit does.
        """
        reach = fitting(int((self._filled * (self._left > 0)).max()) + TOKENS_A_CALL, self.reader.lengths)
        with self.model.scope():
            tokens, self._state = _write(self.model.params, self._state, reach=reach, **self._static)
        tokens = np.asarray(tokens)
        written = (tokens >= 0).sum(0)
        self._filled += written
        self._left -= written
        self._left[np.isin(tokens, self.model.ends).any(0)] = 0
        return tokens

    def warm_up(self) -> None:
        """Compiles all that `read` and `write` will run."""
        size = self.model.config.vision.image_size
        blank = np.zeros((size, size, 3), np.uint8)
        for images in IMAGES_TOGETHER:
            self.reader.embed([Sequence(np.zeros(0, int), np.zeros(0, int), np.stack([blank] * images))])
        for length in self.reader.lengths:
            sequence = Sequence(
                np.full(length - TOKENS_A_CALL - 1, self.model.tokenizer.bos_id, np.int32),
                np.full(length - TOKENS_A_CALL - 1, -1, np.int32),
                np.zeros((0, size, size, 3), np.uint8),
            )
            # </s> is forbidden, so that there is something to go on from.
            start = Start(sequence, Decoding(min_length=self.capacity), TOKENS_A_CALL + 1, 0)
            for rows in READ_TOGETHER:
                slots = self.free[:rows]
                self.read(slots, [start] * len(slots))
                self.write()
                for slot in slots:
                    self.release(slot)


def _stack(decodings: Ordered[Decoding]) -> Decoding:
    """Scalars of R rows -> fields [R]."""
    types: dict[str, Any] = {"min_length": np.int32, "top_k": np.int32}  # the others are float32
    names = [field.name for field in dataclasses.fields(Decoding)]
    stacked: dict[str, Any] = {
        name: np.array([getattr(each, name) for each in decodings], types.get(name, np.float32)) for name in names
    }
    return Decoding(**stacked)


@functools.partial(jax.jit, static_argnames=("config", "count"))
def _empty(params: emu.Params, *, config: emu.EmuConfig, count: int) -> _State:
    """All slots free."""
    none = functools.partial(jnp.zeros, count)
    integer, number = jnp.int32, jnp.float32
    cache = emu.bind(config, params).llama.init_cache(count, config.llama.context, config.dtype)
    state = _State(
        cache=dataclasses.replace(cache, index=none(integer)),
        token=none(integer),
        count=none(integer),
        left=none(integer),
        keys=jax.vmap(jax.random.key)(none(integer)),
        decoding=Decoding(none(integer), none(number), none(number), none(integer), none(number)),
    )
    return _placed(state)


def _placed(state: _State) -> _State:
    """On a mesh, every program leaves the slots as it found them: the caches split by heads, the rest whole."""
    caches = {state.cache.k.shape, state.cache.v.shape}
    return jax.tree.map(
        lambda x: with_logical_constraint(
            x, (None, None, "heads", None, None) if x.shape in caches else (None,) * x.ndim
        ),
        state,
    )


@functools.partial(jax.jit, donate_argnames="state")
def _release(state: _State, slot: Array) -> _State:
    return _placed(dataclasses.replace(state, left=state.left.at[slot].set(0)))


def _inputs(params: emu.Params, tokens: Array, visual: Array, is_visual: Array) -> Array:
    """tokens [R, T], visual [R, T, D] where is_visual [R, T] -> float32 [R, T, D]."""
    words = params["llama"]["embed"]["embedding"]
    return jnp.where(is_visual[..., None], visual, words[tokens].astype(jnp.float32))


@functools.partial(jax.jit, static_argnames=("config", "ends"), donate_argnames="state")
def _read(
    params: emu.Params,
    state: _State,
    slots: Array,
    tokens: Array,
    visual: Array,
    is_visual: Array,
    counts: Array,
    decoding: Decoding,
    limits: Array,
    seeds: Array,
    *,
    config: emu.EmuConfig,
    ends: Ends,
) -> tuple[Array, _State]:
    """R sequences of T positions, the first `counts` [R] of them valid, into slots [R] -> first tokens int32 [R].

    Slots beyond the last are dropped.
    """
    llama = emu.bind(config, params).llama
    rows, length = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(length), (rows, length))
    valid = positions < counts[:, None]
    short = llama.init_cache(rows, length, config.dtype)
    inputs = _inputs(params, tokens, visual, is_visual).astype(config.dtype)
    hidden, short = llama.decode(inputs, positions, short, valid)
    last = jnp.take_along_axis(hidden, counts[:, None, None] - 1, axis=1)[:, 0]  # [R, D]
    keys = jax.vmap(jax.random.key)(seeds)
    first, _ = text.choose_each(llama, last, jnp.zeros(rows, jnp.int32), keys, decoding, ends)

    cache = state.cache
    capacity = cache.valid.shape[1]
    cache = KVCache(
        k=cache.k.at[:, slots, :, :length].set(short.k, mode="drop"),
        v=cache.v.at[:, slots, :, :length].set(short.v, mode="drop"),
        valid=cache.valid.at[slots].set(jnp.pad(valid, ((0, 0), (0, capacity - length))), mode="drop"),
        index=cache.index.at[slots].set(counts, mode="drop"),
    )
    put = functools.partial(jax.tree.map, lambda old, new: old.at[slots].set(new, mode="drop"))
    state = _State(
        cache,
        token=put(state.token, first),
        count=put(state.count, jnp.ones(rows, jnp.int32)),
        left=put(state.left, jnp.where(text.is_end(first, ends), 0, limits - 1)),
        keys=put(state.keys, keys),
        decoding=put(state.decoding, decoding),
    )
    return first, _placed(state)


@functools.partial(jax.jit, static_argnames=("config", "ends", "reach"), donate_argnames="state")
def _write(params: emu.Params, state: _State, *, config: emu.EmuConfig, ends: Ends, reach: int) -> tuple[Array, _State]:
    """All slots go on: int32 [TOKENS_A_CALL, B], -1 in free ones; `reach` positions of the cache are looked at."""
    llama = emu.bind(config, params).llama

    def step(state: _State, _: None) -> tuple[_State, Array]:
        active = state.left > 0
        inputs = llama.embed(state.token[:, None]).astype(config.dtype)  # [B, 1, D]
        before = state.cache.index
        hidden, cache = llama.decode(inputs, before[:, None], state.cache, reach=reach)
        token, _ = text.choose_each(llama, hidden[:, 0], state.count, state.keys, state.decoding, ends)
        # A free slot writes into its next place, over and over, which its next text does as well.
        cache = dataclasses.replace(cache, index=jnp.where(active, cache.index, before))
        left = jnp.where(active & ~text.is_end(token, ends), state.left - 1, 0)
        new = dataclasses.replace(
            state,
            cache=cache,
            token=jnp.where(active, token, state.token),
            count=state.count + active,
            left=left,
        )
        return new, jnp.where(active, token, -1)

    state, tokens = jax.lax.scan(step, state, None, length=TOKENS_A_CALL)
    return tokens, _placed(state)


@functools.partial(jax.jit, static_argnames="config")
def _generate_embeddings(
    params: emu.Params, tokens: Array, visual: Array, is_visual: Array, valid: Array, *, config: emu.EmuConfig
) -> Array:
    return image.generate_embeddings(params, _inputs(params, tokens, visual, is_visual), valid, config=config)
