"""Continuous batching of texts: each has a slot, and one program decodes all slots, whatever requests join or leave.

    slot    0   [ prompt ][ new tokens │ free … ]           every slot has a cache as long as the context and its own
            1   [ a longer prompt ][ new tokens │ free … ]  length; a new prompt is prefilled into a free slot while
            2   [ free …                                 ]  the other slots wait for their next decoding call

A few prompts at a time, padded to one of a few lengths, are prefilled into free slots; then all slots decode a few
tokens in one call. The shapes are few and known beforehand, so all programs are soon compiled (`warm_up`). The
tokens of a slot do not depend on its neighbours: they are those of `Emu.generate_text` and `Chat`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

from emu_jax.generate.model import Emu
from emu_jax.generate.prompt import embed_prompts
from emu_jax.generate.text import Decoding, Ends, choose_each, is_end
from emu_jax.models import emu
from emu_jax.models.llama import KVCache
from emu_jax.serve.encoded_prompt import EncodedPrompt
from emu_jax.serve.prompt_batching import IMAGE_BATCH_SIZES, PromptBatcher, smallest_bucket
from emu_jax.sharding import with_logical_constraint

PREFILL_BATCH_SIZES = (1, 4)  # prompts prefilled by one call
LIKELIEST = 20  # tokens whose log p a scored token has, as many as OpenAI's clients may ask for
TOKENS_PER_CALL = 4  # decoded per slot before anything else gets its turn


@dataclasses.dataclass(frozen=True)
class TextRequest:
    """A text to generate.

    Attributes:
      decoding: scalars. max_new_tokens: fits the context. seed: for sampling.
      scored: whether `ContinuousBatcher.scores` are wanted of its tokens.
    """

    prompt: EncodedPrompt
    decoding: Decoding
    max_new_tokens: int
    seed: int
    scored: bool = False


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenScores:
    """Log p of chosen tokens and of the K likeliest ones, by the model's own distribution.

    That is before temperature, top-k and top-p; what may not end a text yet has none (-inf).
    """

    chosen: Float[Array, " *calls B"]
    likeliest: Float[Array, "*calls B K"]
    likeliest_ids: Int[Array, "*calls B K"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _State:
    """B slots on the device."""

    cache: KVCache  # with one index per slot
    token: Int[Array, " B"]  # the newest token, which is not in the cache yet
    count: Int[Array, " B"]  # new tokens so far
    left: Int[Array, " B"]  # new tokens that may follow; 0: the slot is free
    keys: Key[Array, " B"]
    decoding: Decoding  # fields [B]
    scored: Bool[Array, " B"]  # whether the scores of a slot's tokens are wanted


class ContinuousBatcher:
    """Generates up to `slots` texts at a time with one model. Not thread-safe.

    Attributes:
      scores: what the tokens of the newest call scored, for all its rows; zeros unless one of the rows is `scored`.
    """

    scores: TokenScores

    def __init__(self, model: Emu, slots: int):
        self.model, self.slots, self.prompts = model, slots, PromptBatcher(model)
        self.capacity = model.config.llama.context
        self._static = {"config": model.config, "ends": model.ends}
        self.clear()

    def clear(self) -> None:
        """Frees all slots."""
        with self.model.scope():
            self._state = _empty(self.model.params, config=self.model.config, slots=self.slots)
        if self.model.mesh is None:  # commit the state to a device like the outputs of `_prefill`, or it compiles twice
            self._state = jax.device_put(self._state, self.model.params["llama"]["embed"]["embedding"].sharding)
        self._filled = np.zeros(self.slots, int)  # filled cache positions of each slot
        self._left = np.zeros(self.slots, int)

    @property
    def free(self) -> list[int]:
        """The free slots."""
        return np.flatnonzero(self._left == 0).tolist()

    def release(self, slot: int) -> None:
        """Frees a slot."""
        if self._left[slot]:
            self._left[slot] = 0
            self._state = _release(self._state, np.int32(slot))

    def prefill(self, slots: Sequence[int], requests: Sequence[TextRequest]) -> list[int]:
        """Prefills at most `PREFILL_BATCH_SIZES[-1]` prompts into free slots; returns each one's first new token.

        If that token ends the text, the slot is free again.
        """
        rows = smallest_bucket(len(requests), PREFILL_BATCH_SIZES)
        tokens, visual, is_visual, valid = self.prompts.stack(
            [request.prompt for request in requests], rows, left_padded=False
        )
        targets = np.full(rows, self.slots, np.int32)  # padding rows go beyond the last slot, and are dropped
        targets[: len(slots)] = slots
        filled = list(requests) + [requests[-1]] * (rows - len(requests))
        decoding = _stack([request.decoding for request in filled])
        limits = np.array([request.max_new_tokens for request in filled], np.int32)
        seeds = np.array([request.seed for request in filled], np.uint32)
        counts = valid.sum(1).astype(np.int32)
        scored = np.array([request.scored for request in filled])
        arrays = (targets, tokens, visual, is_visual, counts, decoding, limits, seeds, scored)
        with self.model.scope():
            first, self.scores, self._state = _prefill(self.model.params, self._state, *arrays, **self._static)
        new_tokens = np.asarray(first)[: len(requests)].tolist()
        for slot, request, token in zip(slots, requests, new_tokens, strict=True):
            self._filled[slot] = len(request.prompt.tokens)
            self._left[slot] = 0 if token in self.model.ends else request.max_new_tokens - 1
        return new_tokens

    def decode(self) -> Int[np.ndarray, "TOKENS_PER_CALL B"]:
        """Decodes new tokens in all slots; -1 where a slot is free.

        The token that ends a text (`Emu.ends`) is among them; like the maximum length, it frees the slot.
        """
        reach = smallest_bucket(int((self._filled * (self._left > 0)).max()) + TOKENS_PER_CALL, self.prompts.lengths)
        with self.model.scope():
            tokens, self.scores, self._state = _decode(self.model.params, self._state, reach=reach, **self._static)
        tokens = np.asarray(tokens)
        counts = (tokens >= 0).sum(0)
        self._filled += counts
        self._left -= counts
        self._left[np.isin(tokens, self.model.ends).any(0)] = 0
        return tokens

    def warm_up(self) -> Iterator[None]:
        """Compiles all programs of `prefill` and `decode`, some before each yield; then all slots are as they were."""
        size = self.model.config.vision.image_size
        nothing = np.zeros(0, np.int32)
        for count in IMAGE_BATCH_SIZES:
            self.prompts.encode_images([EncodedPrompt(nothing, nothing, np.zeros((count, size, size, 3), np.uint8))])
            yield
        for length in self.prompts.lengths:
            count = length - TOKENS_PER_CALL - 1
            prompt = EncodedPrompt(
                np.full(count, self.model.tokenizer.bos_id, np.int32),
                np.full(count, -1, np.int32),
                np.zeros((0, size, size, 3), np.uint8),
            )
            # `min_length` forbids </s>, so that there is something to decode.
            request = TextRequest(prompt, Decoding(min_length=self.capacity), TOKENS_PER_CALL + 1, 0)
            for rows in PREFILL_BATCH_SIZES:
                slots = self.free[:rows]
                self.prefill(slots, [request] * len(slots))
                self.decode()
                for slot in slots:
                    self.release(slot)
                yield


def _stack(decodings: Sequence[Decoding]) -> Decoding:
    """R decodings of scalars -> one with fields [R]."""
    types: dict[str, Any] = {"min_length": np.int32, "top_k": np.int32}  # the others are float32
    names = [field.name for field in dataclasses.fields(Decoding)]
    stacked: dict[str, Any] = {
        name: np.array([getattr(each, name) for each in decodings], types.get(name, np.float32)) for name in names
    }
    return Decoding(**stacked)


@functools.partial(jax.jit, static_argnames=("config", "slots"))
def _empty(params: emu.Params, *, config: emu.EmuConfig, slots: int) -> _State:
    """The state with all slots free."""
    none = functools.partial(jnp.zeros, slots)
    integer, number = jnp.int32, jnp.float32
    cache = emu.bind(config, params).llama.init_cache(slots, config.llama.context, config.dtype)
    state = _State(
        cache=dataclasses.replace(cache, index=none(integer)),
        token=none(integer),
        count=none(integer),
        left=none(integer),
        keys=jax.vmap(jax.random.key)(none(integer)),
        decoding=Decoding(none(integer), none(number), none(number), none(integer), none(number)),
        scored=none(bool),
    )
    return _constrain(state)


def _constrain(state: _State) -> _State:
    """On a mesh, every program keeps the state's sharding: caches sharded by heads, everything else replicated."""
    caches = {state.cache.k.shape, state.cache.v.shape}
    return jax.tree.map(
        lambda x: with_logical_constraint(
            x, (None, None, "heads", None, None) if x.shape in caches else (None,) * x.ndim
        ),
        state,
    )


@functools.partial(jax.jit, donate_argnames="state")
def _release(state: _State, slot: Int[Array, ""]) -> _State:
    return _constrain(dataclasses.replace(state, left=state.left.at[slot].set(0)))


@functools.partial(jax.jit, static_argnames=("config", "ends"), donate_argnames="state")
def _prefill(
    params: emu.Params,
    state: _State,
    slots: Int[Array, " R"],
    tokens: Int[Array, "R T"],
    visual: Float[Array, "R T D"],
    is_visual: Bool[Array, "R T"],
    counts: Int[Array, " R"],
    decoding: Decoding,
    limits: Int[Array, " R"],
    seeds: UInt32[Array, " R"],
    scored: Bool[Array, " R"],
    *,
    config: emu.EmuConfig,
    ends: Ends,
) -> tuple[Int[Array, " R"], TokenScores, _State]:
    """Prefills R right-padded prompts of `counts` tokens into slots; returns their first new tokens, with scores.

    Rows whose slot is beyond the last one are dropped.
    """
    llama = emu.bind(config, params).llama
    rows, length = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(length), (rows, length))
    valid = positions < counts[:, None]
    new = llama.init_cache(rows, length, config.dtype)
    words = params["llama"]["embed"]["embedding"]
    inputs = embed_prompts(words, tokens, visual, is_visual).astype(config.dtype)
    hidden, new = llama.decode(inputs, positions, new, valid)
    last = jnp.take_along_axis(hidden, counts[:, None, None] - 1, axis=1)[:, 0]  # [R, D]
    keys = jax.vmap(jax.random.key)(seeds)
    first, log_p = choose_each(llama, last, jnp.zeros(rows, jnp.int32), keys, decoding, ends)

    cache = state.cache
    capacity = cache.valid.shape[1]
    cache = KVCache(
        k=cache.k.at[:, slots, :, :length].set(new.k, mode="drop"),
        v=cache.v.at[:, slots, :, :length].set(new.v, mode="drop"),
        valid=cache.valid.at[slots].set(jnp.pad(valid, ((0, 0), (0, capacity - length))), mode="drop"),
        index=cache.index.at[slots].set(counts, mode="drop"),
    )
    put = functools.partial(jax.tree.map, lambda old, new: old.at[slots].set(new, mode="drop"))
    state = _State(
        cache,
        token=put(state.token, first),
        count=put(state.count, jnp.ones(rows, jnp.int32)),
        left=put(state.left, jnp.where(is_end(first, ends), 0, limits - 1)),
        keys=put(state.keys, keys),
        decoding=put(state.decoding, decoding),
        scored=put(state.scored, scored),
    )
    return first, _scores(log_p, first, scored), _constrain(state)


def _scores(log_p: Float[Array, "B V"], tokens: Int[Array, " B"], scored: Bool[Array, " B"]) -> TokenScores:
    """Scores of tokens. Without a scored row they cost nothing: the search for the likeliest tokens is skipped."""
    rows, count = len(log_p), min(LIKELIEST, log_p.shape[-1])

    def found() -> TokenScores:
        likeliest, ids = jax.lax.top_k(log_p, count)
        chosen = jnp.take_along_axis(log_p, tokens[:, None], axis=-1)[:, 0]
        return TokenScores(chosen, likeliest, ids.astype(jnp.int32))

    def nothing() -> TokenScores:
        zeros = jnp.zeros((rows, count))
        return TokenScores(zeros[:, 0], zeros, zeros.astype(jnp.int32))

    return jax.lax.cond(scored.any(), found, nothing)


@functools.partial(jax.jit, static_argnames=("config", "ends", "reach"), donate_argnames="state")
def _decode(
    params: emu.Params, state: _State, *, config: emu.EmuConfig, ends: Ends, reach: int
) -> tuple[Int[Array, "TOKENS_PER_CALL B"], TokenScores, _State]:
    """Decodes new tokens in all slots, -1 in free ones, with scores.

    Attention reads the first `reach` positions of the cache.
    """
    llama = emu.bind(config, params).llama

    def step(state: _State, _: None) -> tuple[_State, tuple[Int[Array, " B"], TokenScores]]:
        active = state.left > 0
        inputs = llama.embed(state.token[:, None]).astype(config.dtype)  # [B, 1, D]
        before = state.cache.index
        hidden, cache = llama.decode(inputs, before[:, None], state.cache, reach=reach)
        token, log_p = choose_each(llama, hidden[:, 0], state.count, state.keys, state.decoding, ends)
        # A free slot writes to the same position of its cache again and again; its next text overwrites that.
        cache = dataclasses.replace(cache, index=jnp.where(active, cache.index, before))
        left = jnp.where(active & ~is_end(token, ends), state.left - 1, 0)
        new = dataclasses.replace(
            state,
            cache=cache,
            token=jnp.where(active, token, state.token),
            count=state.count + active,
            left=left,
        )
        return new, (jnp.where(active, token, -1), _scores(log_p, token, active & state.scored))

    state, (tokens, scores) = jax.lax.scan(step, state, None, length=TOKENS_PER_CALL)
    return tokens, scores, _constrain(state)
